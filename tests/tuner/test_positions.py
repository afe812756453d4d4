import pytest
import torch
from peft import get_peft_model
from tiny import _SHAPE, ARCHITECTURES, make_model, make_sae, random_code, random_ids, set_code
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ContinuousBatchingConfig,
    Gemma3nTextConfig,
    GenerationConfig,
    MambaConfig,
    T5Config,
    XLNetConfig,
)

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.positions import span_of

PROMPT, ANSWER = 5, 4
# The tokens of a prompt of 5 and an answer of 4 that each steers.
STEERED = {
    "all": [1] * 9,
    "completion": [0] * 5 + [1] * 4,
    "last": [0] * 4 + [1] * 5,
    "prompt": [1] * 5 + [0] * 4,
    "prompt[:2]": [1] * 2 + [0] * 7,
    "prompt[-2:]": [0] * 3 + [1] * 2 + [0] * 4,
    "prompt[1:-1]": [0] + [1] * 3 + [0] * 5,
    "prompt[:9]": [1] * 5 + [0] * 4,
    "completion[:2]": [0] * 5 + [1] * 2 + [0] * 2,
    "completion[1:3]": [0] * 6 + [1] * 2 + [0],
    "completion[3:]": [0] * 8 + [1],
}


def model_at(positions, architecture="llama", layer=2):
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=layer, sae=make_sae(), positions=positions))
    set_code(model, random_code())
    return model


def moved_tokens(model, **inputs):
    """Tokens whose state after the steered block differs from the base model's."""
    with torch.no_grad():
        steered = model(output_hidden_states=True, **inputs).hidden_states[3]
        with model.disable_adapter():
            base = model(output_hidden_states=True, **inputs).hidden_states[3]
    return (steered != base).any(-1)


def labels_of(ids):
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return labels


@pytest.mark.parametrize(
    ("positions", "with_labels", "expected"),
    [
        *((positions, True, expected) for positions, expected in STEERED.items()),
        ("all", False, [1] * 9),
        ("completion", False, [0] * 9),
        ("completion[1:3]", False, [0] * 9),
        ("last", False, [0] * 8 + [1]),
        ("prompt", False, [1] * 9),
        ("prompt[-2:]", False, [0] * 7 + [1] * 2),
    ],
)
def test_tokens_that_are_steered(positions, with_labels, expected):
    ids = random_ids(2, PROMPT + ANSWER)
    inputs = {"input_ids": ids} | ({"labels": labels_of(ids)} if with_labels else {})
    assert moved_tokens(model_at(positions), **inputs).int().tolist() == [expected] * 2


@pytest.mark.parametrize("positions", STEERED)
@pytest.mark.parametrize(("padding", "cache"), [(0, None), (3, None), (3, "static")])
def test_generation_serving_and_labels_steer_the_same_tokens(positions, padding, cache):
    """One meaning for training, generation (step by step, with padding) and vLLM."""
    span = span_of(positions)
    first, end = span.within(PROMPT)
    assert [int(first <= place < (end or 99)) for place in range(PROMPT + ANSWER)] == STEERED[positions]
    model, steered = model_at(positions), []

    def watch(module, args, output):
        steered.append((output != args[0]).any(-1)[0].int().tolist())

    steered_layers(model)[0].register_forward_hook(watch)
    prompt = torch.cat([torch.zeros(1, padding, dtype=torch.long), random_ids(1, PROMPT)], 1)
    options = {"max_new_tokens": ANSWER + 1, "min_new_tokens": ANSWER + 1, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=prompt, attention_mask=(prompt != 0).long(), cache_implementation=cache, **options)
    assert [each for step in steered for each in step][padding:] == STEERED[positions]


def test_a_padded_prompt_that_is_passed_in_parts_is_counted_from_its_start():
    model, steered = model_at("prompt[:2]"), []
    steered_layers(model)[0].register_forward_hook(
        lambda module, args, output: steered.extend((output != args[0]).any(-1)[0].int().tolist())
    )
    prompt = torch.cat([torch.zeros(1, 3, dtype=torch.long), random_ids(1, PROMPT)], 1)
    options = {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": False, "prefill_chunk_size": 4}
    model.generate(input_ids=prompt, attention_mask=(prompt != 0).long(), **options)
    assert [place for place, is_steered in enumerate(steered) if is_steered and place >= 3] == [3, 4]


def test_answers_that_share_a_prompt_are_counted_each_from_its_start():
    """The layout in which the trainer runs a prompt once, twice in a row: two pairs, whose positions start again."""
    ids, scored = random_ids(1, 14), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]])
    labels = ids.masked_fill(scored == 0, -100)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 2, 3, 0, 0]])
    mask = torch.zeros(1, 1, 14, 14)
    for positions, expected in {
        "completion[:1]": [3, 5, 9, 10],
        "completion[1:]": [4, 6, 11],
        "prompt[-1:]": [2, 8],
        "prompt[:1]": [0, 7],
        "last": [2, 3, 4, 5, 6, 8, 9, 10, 11],
    }.items():
        inputs = {"input_ids": ids, "labels": labels, "position_ids": position_ids, "attention_mask": mask}
        assert moved_tokens(model_at(positions), **inputs)[0].nonzero().flatten().tolist() == expected, positions


def test_tokens_behind_an_answer_are_no_part_of_the_next_text_of_a_packed_row():
    ids, scored = random_ids(1, 10), torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 1, 1]])
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    inputs = {"input_ids": ids, "labels": ids.masked_fill(scored == 0, -100), "position_ids": position_ids}
    for positions, expected in {"prompt[:1]": [0, 6], "prompt[-3:]": [0, 1, 6, 7], "last": [1, 2, 3, 7, 8, 9]}.items():
        assert moved_tokens(model_at(positions), **inputs)[0].nonzero().flatten().tolist() == expected, positions


def test_steps_outside_generate_steer_what_is_known():
    prompt, step = random_ids(1, PROMPT), random_ids(1, 1, seed=1)
    for positions, expected in {"prompt[:2]": 0, "completion": 1, "last": 1, "completion[1:]": None}.items():
        model = model_at(positions)
        with torch.no_grad():
            past = model(prompt, use_cache=True).past_key_values
        if expected is None:
            with pytest.raises(UnsupportedOperationError, match="which is not known here: use generate"):
                model(step, past_key_values=past)
            continue
        steered = []
        steered_layers(model)[0].register_forward_hook(
            lambda module, args, output, into=steered: into.append(int((output != args[0]).any()))
        )
        with torch.no_grad():
            model(step, past_key_values=past)
        assert steered == [expected], positions


@pytest.mark.parametrize(
    "positions",
    ["prompts", "prompt[]", "prompt[3:3]", "prompt[-2:-2]", "completion[-3:]", "completion[:0]", "all[1:]", 3],
)
def test_positions_that_name_no_tokens_are_refused(positions):
    with pytest.raises(ConfigError, match="positions="):
        YaPOConfig(layers=1, sae=make_sae(), positions=positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_is_the_last_attended_token(side):
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    moved = moved_tokens(model_at("last"), input_ids=random_ids(2, 6), attention_mask=mask)
    assert moved[0].nonzero().flatten().tolist() == [5 if side == "left" else 3]
    assert moved[1].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "completion", "last", "prompt[-3:]", "completion[1:3]"])
def test_generation_steers_what_scoring_with_labels_steers(architecture, positions):
    model = model_at(positions, architecture)
    prompt = random_ids(2, PROMPT)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    with torch.no_grad():
        scored = model(input_ids=generated, labels=labels_of(generated)).logits[:, PROMPT - 1 : -1]
    scored[..., 2] = -torch.inf  # min_new_tokens forbids the end of the sequence
    assert torch.equal(scored.argmax(-1), generated[:, PROMPT:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_cache_and_left_padding_change_nothing(architecture, positions):
    model = model_at(positions, architecture)
    short, long = random_ids(1, PROMPT, seed=1), random_ids(1, PROMPT + 3, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = (padded != 0).long()
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=padded, attention_mask=mask, **options)[:, -ANSWER:]
    for row, prompt in enumerate((short, long)):
        for use_cache in (True, False) if positions == "all" else (True,):
            alone = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **options
            )
            assert torch.equal(alone[0, -ANSWER:], together[row])


@pytest.mark.parametrize("positions", ["completion", "last"])
def test_a_second_turn_that_reuses_the_cache_is_prompt_again(positions):
    model, first = model_at(positions), random_ids(1, PROMPT)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    turn = model.generate(first, attention_mask=torch.ones_like(first), return_dict_in_generate=True, **options)
    second = torch.cat([turn.sequences, random_ids(1, 6, seed=3)], dim=1)
    steered = []

    def watch(module, args, output):
        steered.append((output != args[0]).any(-1)[0].int().tolist())

    steered_layers(model)[0].register_forward_hook(watch)
    model.generate(second, attention_mask=torch.ones_like(second), past_key_values=turn.past_key_values, **options)
    # The last answer's last token is not in the cache yet.
    assert steered[0] == [0] * 7 if positions == "completion" else [0] * 6 + [1]
    assert all(step == [1] for step in steered[1:])


def packed_generate(model):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    config = GenerationConfig(**options)
    # Without these sizes it fills buffers as large as the memory allows.
    sizes = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9)]
    results = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=sizes)
    results = sorted(results.values(), key=lambda result: len(result.prompt_ids))
    alone = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    return results, alone


@pytest.mark.feature("transformers", "Continuous batching (`generate_batch`)")
def test_continuous_batching():
    model = model_at("all").eval()
    results, alone = packed_generate(model)
    assert [result.generated_tokens for result in results] == alone


@pytest.mark.feature(
    "transformers",
    "Continuous batching with `positions` other than all, or `multipliers=` and `adapter_names=` by row",
    refused="prompts are packed into one row there",
)
@pytest.mark.parametrize("positions", ["completion", "last"])
def test_continuous_batching_cannot_tell_tokens_and_rows_apart(positions):
    results, _ = packed_generate(model_at(positions).eval())
    assert all("cannot tell prompts and answers apart" in result.error for result in results)
    with pytest.raises(UnsupportedOperationError, match="multipliers= cannot be used in generate_batch"):
        model_at("all").eval().generate_batch(inputs=[[3]], multipliers=[1.0])


def test_without_a_prompt_the_bos_token_is_the_prompt():
    model = model_at("completion").eval()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**options), model.generate(torch.tensor([[1]]), **options))


@pytest.mark.feature(
    "transformers", "Gemma 3n (its layers return four streams)", refused="there is no one hidden state"
)
def test_blocks_with_several_streams_are_refused():
    own = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    own |= {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "layer_types": ["full_attention"] * 4}
    model = AutoModelForCausalLM.from_config(Gemma3nTextConfig(**_SHAPE, **own)).eval()
    model = get_peft_model(model, YaPOConfig(layers=2, sae=make_sae()))
    with pytest.raises(UnsupportedOperationError, match="this architecture is not supported"):
        model(random_ids())


UNCOUNTABLE = {
    "T5": (T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4), "SEQ_2_SEQ_LM"),
    "XLNet": (XLNetConfig(vocab_size=128, d_model=32, n_layer=4, n_head=4, d_inner=64), "CAUSAL_LM"),
    "Mamba": (
        MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4, state_size=8, pad_token_id=0),
        "CAUSAL_LM",
    ),
}


@pytest.mark.feature(
    "transformers",
    "`positions` other than all in encoder-decoders, and in Mamba with its state; XLNet",
    refused="prompts and answers, or rows and tokens, would be mixed up",
)
@pytest.mark.parametrize("name", UNCOUNTABLE)
@pytest.mark.parametrize("positions", ["completion", "last"])
def test_models_whose_tokens_cannot_be_counted_are_refused(name, positions):
    config, task = UNCOUNTABLE[name]
    kind = AutoModelForSeq2SeqLM if task == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    model, adapter = kind.from_config(config), YaPOConfig(layers=2, sae=make_sae(), positions=positions, task_type=task)
    with pytest.raises((ConfigError, UnsupportedOperationError), match=r"positions='|XLNet cannot be steered"):
        get_peft_model(model, adapter).generate(random_ids(), max_new_tokens=2, eos_token_id=None)
