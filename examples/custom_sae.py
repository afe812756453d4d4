"""An SAE of one's own, from plain tensors to a self-contained adapter.

python examples/custom_sae.py --out out/custom

Here the tensors are those of the embedded SAE. To train one first: examples/train_sae.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from embedded import load_model_and_tokenizer, preferences, sae_folder, sae_layer
from peft import PeftModel, get_peft_model
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import load_file

from yapo_peft import YaPOConfig, steering
from yapo_peft.methods import fit_sas, measure_contrast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/custom"))
    parser.add_argument("--pairs", type=int, default=40, help="how many pairs to read")
    parser.add_argument("--tau", type=float, default=0.7, help="share of answers in which a feature has to be on")
    options = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer()
    layer = sae_layer()

    print("1. An SAE object of sae-lens, from tensors")
    sae = from_tensors(load_file(Path(sae_folder()) / "sae_weights.safetensors"), layer)

    print("2. Does it fit the model?")
    pairs = preferences("enthusiasm", "train").select(range(options.pairs))
    report_fit(model, tokenizer, sae, layer, [pair["chosen"][0]["content"] for pair in pairs])

    print("3. A code without training (SAS)")
    model = get_peft_model(model, YaPOConfig(layers=layer, sae=sae, self_contained=True))
    fit_sas(model, measure_contrast(model, pairs, tokenizer), tau=options.tau)

    print("4. Saved with what it needs of the SAE, and loaded without the SAE")
    model.save_pretrained(options.out)
    size = (options.out / "adapter_model.safetensors").stat().st_size
    ids = tokenizer("Tell me about tea.", return_tensors="pt")
    with torch.no_grad(), steering(model, 1.0):
        expected = model(**ids).logits
    loaded = PeftModel.from_pretrained(load_model_and_tokenizer()[0], options.out).eval()
    with torch.no_grad(), steering(loaded, 1.0):
        difference = float((loaded(**ids).logits - expected).abs().max())
    print(f"{options.out}: {size / 1024:.0f} KB; logits differ by {difference:.1e} at most.")


def from_tensors(tensors: dict[str, torch.Tensor], layer: int) -> JumpReLUSAE:
    """W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc and threshold (d_sae,), b_dec (d_in,)."""
    d_in, d_sae = tensors["W_enc"].shape
    # An encoder that subtracts b_dec from its input first needs apply_b_dec_to_input=True.
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"  # what it reads; another block is refused
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return sae


@torch.no_grad()
def report_fit(model, tokenizer, sae: JumpReLUSAE, layer: int, texts: list[str]) -> None:
    """Explained variance and L0 at a block's output, without the first tokens, which are attention sinks."""
    found = []
    for text in texts:
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        found.append(output.hidden_states[layer + 1][0, 2:])
    h = torch.cat(found)
    features = sae.encode(h)
    l0 = float((features > 0).sum(dim=1).float().mean())
    missed = (h - sae.decode(features)).pow(2).sum() / (h - h.mean(dim=0)).pow(2).sum()
    print(f"It explains {100 * (1 - float(missed)):.0f} % of the variance with {l0:.0f} features a token.")


if __name__ == "__main__":
    main()
