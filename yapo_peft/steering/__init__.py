"""The mathematics of steering, as pure functions of activations, codes and autoencoders."""
