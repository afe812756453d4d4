"""The errors of yapo_peft, in one tree.

    YaPOError
    ├── ConfigError             (ValueError)           a field of a config, or an argument, has a value that cannot work
    ├── SAEError
    │   ├── SAENotFoundError    (FileNotFoundError)    no sparse autoencoder where the config points
    │   ├── UnsupportedSAEError (NotImplementedError)  its architecture or normalisation is not supported
    │   └── SAEMismatchError    (ValueError)           it does not fit the model, the layer, or the adapter
    ├── AdapterFileError        (ValueError)           a saved adapter is truncated, or has wrong names or shapes
    ├── ActivationCacheError    (OSError)              cached activations do not fit on the disk, or are damaged
    ├── DatasetError            (ValueError)           a dataset is empty, lacks columns, or holds nothing to learn from
    ├── NonFiniteLossError      (FloatingPointError)   training produced NaN or infinity
    └── UnsupportedOperationError (NotImplementedError) a PEFT or TRL feature that steering cannot honour

Each error also inherits the built-in that a caller would expect, so `except ValueError` keeps working.
"""


class YaPOError(Exception):
    """Base class of every error that yapo_peft raises on purpose."""


class ConfigError(YaPOError, ValueError):
    """A field of a config, or an argument, has a value that cannot work."""


class SAEError(YaPOError):
    """Base class of the errors about sparse autoencoders."""


class SAENotFoundError(SAEError, FileNotFoundError):
    """There is no sparse autoencoder where the config points."""


class UnsupportedSAEError(SAEError, NotImplementedError):
    """The sparse autoencoder's architecture or normalisation is not supported."""


class SAEMismatchError(SAEError, ValueError):
    """The sparse autoencoder does not fit the model, the layer, or the adapter."""


class AdapterFileError(YaPOError, ValueError):
    """A saved adapter is truncated, or holds tensors of the wrong name, type or shape."""


class ActivationCacheError(YaPOError, OSError):
    """Cached activations do not fit on the disk, are damaged, or do not fit the model."""


class DatasetError(YaPOError, ValueError):
    """A dataset is empty, lacks columns, or holds nothing to learn from."""


class NonFiniteLossError(YaPOError, FloatingPointError):
    """Training produced a loss or a code that is NaN or infinite."""


class UnsupportedOperationError(YaPOError, NotImplementedError):
    """A feature of PEFT or TRL that sparse steering cannot honour."""
