"""YaPO as the PEFT method of TRL's own trainers: `peft_config` given, or a model that is wrapped already."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import make_model, make_sae, preference_rows, random_code, random_ids, set_code, trained_codes
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import use_adapter

from yapo_peft import UnsupportedOperationError, YaPOConfig, YaPOError

PAIRS = preference_rows()
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
CHATS = [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]
SAMPLING = {"max_completion_length": 6}
GROUPS = SAMPLING | {"num_generations": 4, "per_device_train_batch_size": 4}
ONLINE = GROUPS | {"beta": 0.1}
ANSWERS = [(row["prompt"], row[key], key == "chosen") for row in PAIRS for key in ("chosen", "rejected")]
LABELLED = [dict(zip(("prompt", "completion", "label"), answer, strict=True)) for answer in ANSWERS]
TRAINERS = {  # name: module, rows, options
    "SFT": ("trl", LABELLED[::2], {}),
    "DPO": ("trl", PAIRS, {}),
    "KTO": ("trl", LABELLED, {}),
    "Reward": ("trl", PAIRS, {}),
    "GRPO": ("trl", PROMPTS, ONLINE),
    "RLOO": ("trl", PROMPTS, ONLINE),
    "Distillation": ("trl", PROMPTS, SAMPLING),
    "CPO": ("trl.experimental.cpo", PAIRS, {"max_length": 64, "remove_unused_columns": False}),
    "ORPO": ("trl.experimental.orpo", PAIRS, {"max_length": 64, "remove_unused_columns": False}),
    "TPO": ("trl.experimental.tpo", [{**row, "reference": row["chosen"]} for row in PAIRS], {}),
    "GKD": ("trl.experimental.gkd", CHATS, {"max_new_tokens": 6}),
    "OnlineDPO": ("trl.experimental.online_dpo", PROMPTS, {"max_new_tokens": 6}),
    "GMPO": ("trl.experimental.gmpo", PROMPTS, ONLINE),
    "SDFT": ("trl.experimental.sdft", [{**row, "privileged_context": "w1 w2"} for row in PROMPTS], SAMPLING),
    "SDPO": ("trl.experimental.sdpo", PROMPTS, GROUPS | {"teacher_model_kind": "base"}),
}
REWARDED, TAUGHT = ("GRPO", "RLOO", "GMPO", "OnlineDPO", "SDPO"), ("GKD", "Distillation")
# Metric that is 0 in the first step exactly if the policy is its own reference.
REFERENCED = {"DPO": "rewards/margins", "KTO": "rewards/margins", "GRPO": "kl", "RLOO": "kl"}
# They give the model no labels while training it. Neither does Reward, which reads the last position alone.
WITHOUT_LABELS = ("CPO", "ORPO", "TPO", "GKD", "OnlineDPO", "SDFT", "SDPO", "Distillation")
ZERO = random_code(0)
MODES = pytest.mark.parametrize("mode", ["given", "ready"])


def varied_reward(completions, **_):
    return [float(sum(map(ord, messages[0]["content"])) % 7) for messages in completions]


def base_model(name):
    model = make_model()
    if name != "Reward":
        return model
    model.config.num_labels = 1
    rewarder = LlamaForSequenceClassification(model.config)
    rewarder.model.load_state_dict(model.model.state_dict())
    return rewarder


def config(name, **options):
    # Under "SEQ_CLS" PEFT trains the head too; here it is a trained one, and the code is all there is to learn.
    task = "FEATURE_EXTRACTION" if name == "Reward" else "CAUSAL_LM"
    return YaPOConfig(layers=2, sae=make_sae(), **{"task_type": task} | options)


@pytest.fixture
def build(tmp_path, tokenizer):
    def make(name, mode="given", model=None, adapter=None, code=ZERO, **options):
        module, rows, own = TRAINERS[name]
        model = model or base_model(name)
        adapter = config(name, **(adapter or {}))
        extra = {"peft_config": adapter} if mode == "given" else {}
        if mode == "ready":
            model = get_peft_model(model, adapter)
            set_code(model, code)
        if name in REWARDED:
            extra["reward_funcs"] = varied_reward
        if name in TAUGHT:
            extra["teacher_model"] = make_model(seed=3)
        options = {"max_steps": 3, "learning_rate": 0.1, "warmup_steps": 0, "logging_steps": 1} | own | options
        args = getattr(import_module(module), f"{name}Config")(
            output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, save_strategy="no", **options
        )
        # TRL adds tokens to the tokenizer that it gets, which tests share.
        own_tokenizer = deepcopy(tokenizer)
        trainer = getattr(import_module(module), f"{name}Trainer")(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=own_tokenizer, **extra
        )
        if mode == "given":
            set_code(trainer.model, code)
        return trainer

    return make


def log_probs(model, ids, attention_mask, labels):
    """Log-probabilities of the labelled tokens, (batch, seq - 1), 0 elsewhere."""
    with torch.no_grad():
        logp = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(dim=-1)
    scored = labels[:, 1:]
    return logp.gather(-1, scored.clamp(min=0)[..., None]).squeeze(-1).masked_fill(scored == -100, 0)


@torch.no_grad()
def assert_same_logits(model, other):
    assert torch.equal(*(each.eval()(input_ids=random_ids()).logits for each in (model, other)))


@pytest.mark.feature("TRL", "`peft_config=YaPOConfig(...)` or a ready PeftModel in " + ", ".join(TRAINERS))
@MODES
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_only_changes_the_code_and_its_adapter_loads(build, name, mode, tmp_path):
    trainer = build(name, mode)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert [key.rsplit(".", 2)[1:] for key in changed] == [["yapo_code", "default"]]
    code = trained_codes(trainer)
    assert code.dtype == torch.float32
    assert code.isfinite().all()
    trainer.save_model()
    assert_same_logits(PeftModel.from_pretrained(base_model(name), tmp_path / "out"), trainer.model)


@pytest.mark.feature("TRL", "The reference is the unsteered model in " + ", ".join(REFERENCED))
@MODES
@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("density", [0, 0.5])
def test_the_reference_is_the_unsteered_model(build, name, mode, density, monkeypatch):
    code = random_code(density)
    trainer = build(name, mode, code=code, max_steps=1)
    base, seen = trainer.model.get_base_model(), []

    def record(_, args, inputs, output):
        seen.append((inputs["input_ids"], inputs["attention_mask"], inputs["labels"], output.log_probs))

    @contextmanager
    def watched(model, adapter_name):
        with use_adapter(model, adapter_name), base.register_forward_hook(record, with_kwargs=True):
            yield

    monkeypatch.setattr(import_module(f"trl.trainer.{name.lower()}_trainer"), "use_adapter", watched)
    trainer.train()
    steered = get_peft_model(make_model(), config(name))
    set_code(steered, code)
    assert seen
    for *batch, reference in seen:
        torch.testing.assert_close(reference, log_probs(make_model(), *batch), rtol=1e-4, atol=1e-5)
        assert torch.allclose(reference, log_probs(steered, *batch), atol=1e-3) == (density == 0)
    assert (trainer.state.log_history[0][REFERENCED[name]] == 0) == (density == 0)


class Sender(VLLMGeneration):
    """The part of TRL's vLLM generation that reads the weights to send."""

    def __init__(self, model):
        self.model = model
        self._dist = DistributedBackend(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))


def received_by_vllm(model):
    return {name: parameter.clone() for name, parameter in Sender(model)._iter_named_params()}


@pytest.mark.feature("TRL", "`use_vllm` where multiplier x code is nowhere negative and the layer has a bias (GPT-2)")
def test_vllm_gets_the_merged_weights():
    model = get_peft_model(make_model("gpt2"), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code().abs())
    before = model(random_ids()).logits
    received = received_by_vllm(model)
    assert torch.equal(model(random_ids()).logits, before)
    plain = make_model("gpt2")
    plain.load_state_dict(received, strict=False)
    assert received.keys() == dict(plain.named_parameters()).keys()
    torch.testing.assert_close(plain(random_ids()).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.feature(
    "TRL", "`use_vllm` elsewhere", refused="TRL sends merged weights, and a code that lowers features has none"
)
@pytest.mark.parametrize(("architecture", "code"), [("gpt2", random_code()), ("llama", random_code().abs())])
def test_vllm_never_gets_unsteered_weights(architecture, code):
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, code)
    with pytest.raises(UnsupportedOperationError, match="cannot be merged"):
        received_by_vllm(model)


@pytest.mark.feature("TRL", "Codes stay in float32 on quantised models, where TRL casts what it trains")
@MODES
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_code_stays_float32_on_a_quantized_model(build, name, mode):
    model = make_model()
    model.is_loaded_in_4bit = True  # what TRL asks; the trainer then casts trainable parameters to bfloat16
    trainer = build(name, mode, model=model)
    trainer.train()
    assert trained_codes(trainer).dtype == torch.float32


@pytest.mark.feature(
    "TRL",
    '`positions` other than "all" in ' + ", ".join(WITHOUT_LABELS),
    refused="these trainers call the model without the labels that tell which tokens are the answer's",
)
@pytest.mark.parametrize(
    ("name", "positions"),
    [(name, positions) for name in WITHOUT_LABELS for positions in ("completion", "last")] + [("Reward", "completion")],
)
def test_positions_that_need_labels_are_rejected_without_them(build, name, positions):
    trainer = build(name, adapter={"positions": positions})
    with pytest.raises(UnsupportedOperationError, match=f"positions='{positions}'"):
        trainer.train()


@pytest.mark.feature("TRL", "The new head of a reward model is trained and saved (`modules_to_save`)")
@pytest.mark.parametrize("adapter", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}], ids=str)
def test_the_new_head_of_a_reward_model_is_trained_and_saved(build, adapter, tmp_path):
    folder = str(tmp_path / "base")
    make_model().save_pretrained(folder)
    trainer = build("Reward", model=folder, adapter=adapter)
    heads = {key: value.clone() for key, value in trainer.model.named_parameters() if "score.modules_to_save" in key}
    trainer.train()
    trainer.save_model()
    assert heads
    assert all(not torch.equal(trainer.model.get_parameter(key), value) for key, value in heads.items())
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert_same_logits(PeftModel.from_pretrained(base, tmp_path / "out"), trainer.model)


@pytest.mark.feature("TRL", "`chat_template_path` that adds tokens", refused="codes cannot train new embeddings")
def test_chat_template_that_adds_tokens_is_not_supported(build, tmp_path, tokenizer):
    other = deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": "<|im_end|>"})
    other.save_pretrained(tmp_path / "chat")
    with pytest.raises(YaPOError, match="tokens"):
        build("SFT", chat_template_path=str(tmp_path / "chat"))
