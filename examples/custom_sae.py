"""Builds an SAE from plain tensors, and saves a self-contained adapter that uses it.

python examples/custom_sae.py --out out/custom

The tensors here come from the embedded SAE. `yapo sae train` trains one.
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
    parser.add_argument("--pairs", type=int, default=40, help="number of preference pairs to use")
    parser.add_argument("--tau", type=float, default=0.7, help="share of answers in which a feature must be active")
    options = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer()
    layer = sae_layer()

    print("1. Build a sae-lens SAE from tensors")
    sae = from_tensors(load_file(Path(sae_folder()) / "sae_weights.safetensors"), layer)

    print("2. Check that the SAE fits the model")
    pairs = preferences("enthusiasm", "train").select(range(options.pairs))
    report_fit(model, tokenizer, sae, layer, [pair["chosen"][0]["content"] for pair in pairs])

    print("3. Fit a code without training (SAS)")
    model = get_peft_model(model, YaPOConfig(layers=layer, sae=sae, self_contained=True))
    fit_sas(model, measure_contrast(model, pairs, tokenizer), tau=options.tau)

    print("4. Save the adapter with the SAE weights it needs, and load it without the SAE")
    model.save_pretrained(options.out)
    size = (options.out / "adapter_model.safetensors").stat().st_size
    ids = tokenizer("Tell me about tea.", return_tensors="pt")
    with torch.no_grad(), steering(model, 1.0):
        expected = model(**ids).logits
    loaded = PeftModel.from_pretrained(load_model_and_tokenizer()[0], options.out).eval()
    with torch.no_grad(), steering(loaded, 1.0):
        difference = float((loaded(**ids).logits - expected).abs().max())
    print(f"{options.out}: {size / 1024:.0f} KB; logits differ by at most {difference:.1e}.")


def from_tensors(tensors: dict[str, torch.Tensor], layer: int) -> JumpReLUSAE:
    """Builds an SAE from `W_enc` `(d_in, d_sae)`, `W_dec` `(d_sae, d_in)`, `b_enc`, `threshold` and `b_dec`."""
    d_in, d_sae = tensors["W_enc"].shape
    # Set apply_b_dec_to_input=True for an encoder that subtracts b_dec from its input.
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"  # checked against the adapter's layer
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return sae


@torch.no_grad()
def report_fit(model, tokenizer, sae: JumpReLUSAE, layer: int, texts: list[str]) -> None:
    """Prints explained variance and L0 on the layer's output, skipping the first tokens, which are attention sinks."""
    outputs = []
    for text in texts:
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        outputs.append(output.hidden_states[layer + 1][0, 2:])
    h = torch.cat(outputs)
    features = sae.encode(h)
    l0 = float((features > 0).sum(dim=1).float().mean())
    unexplained = (h - sae.decode(features)).pow(2).sum() / (h - h.mean(dim=0)).pow(2).sum()
    print(f"The SAE explains {100 * (1 - float(unexplained)):.0f} % of the variance with {l0:.0f} features per token.")


if __name__ == "__main__":
    main()
