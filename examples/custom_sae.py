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
from yapo_peft.sae_training import measure_sae


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
    sae.save_model(options.out / "sae")
    fit = measure_sae(model, tokenizer, pairs, path=str(options.out / "sae"))
    print(f"The SAE explains {fit['explained_variance']:.0%} of the variance with {fit['l0']:.0f} features per token.")

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
    # Gemma Scope's encoders do not subtract b_dec from their input: apply_b_dec_to_input=False.
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=True))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"  # checked against the adapter's layer
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return sae


if __name__ == "__main__":
    main()
