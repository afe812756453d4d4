"""vLLM's engine itself, beside the transformers path. `make test-vllm` runs these in an environment of their own."""

import os
import random
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from served import (
    ADAPTERS,
    CONFIGS,
    HAS_VLLM,
    VOCABULARY,
    assert_as_transformers,
    expected,
    load_all,
    needs_vllm,
    save_adapters,
    save_model,
)
from transformers import AutoModelForCausalLM

from yapo_peft.errors import ConfigError, YaPOError
from yapo_vllm import list_adapters, load_adapter, unload_adapter

if HAS_VLLM:
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

pytestmark = [pytest.mark.slow, needs_vllm]


@contextmanager
def engine_of(folder, sources, variables=None, **options):
    """An engine that serves some adapters."""
    before = dict(os.environ)
    os.environ.update({"YAPO_ADAPTERS": ",".join(f"{n}={s}" for n, s in sources.items()), **(variables or {})})
    settings = {"max_model_len": 256, "max_num_seqs": 32, "max_num_batched_tokens": 64, "dtype": "float32"}
    settings |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**27, "skip_tokenizer_init": True}
    llm = LLM(str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        os.environ.clear()
        os.environ.update(before)


def parameters(steering=None, tokens=8, **options):
    asked = [{"adapter": name, "multiplier": multiplier} for name, multiplier in (steering or {}).items()]
    options = {"temperature": 0, "max_tokens": tokens, "logprobs": 0, "detokenize": False, "ignore_eos": True} | options
    return SamplingParams(**options, extra_args={"yapo": asked} if asked else None)


def answers(llm, prompts, steerings, **options):
    """The completion of each prompt, each under its own steering, in one batch."""
    settings = [parameters(steering, **options) for steering in steerings]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(inputs, settings, use_tqdm=False)]


def drawn_prompts(count, seed=0, longest=100):
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, longest))] for _ in range(count)]


def drawn_steerings(count, names, seed=0):
    draw = random.Random(seed)
    multipliers = (-2.0, -1.0, -0.3, 0.5, 1.0, 1.7)
    return [{n: draw.choice(multipliers) for n in draw.sample(names, draw.choice((0, 1, 1, 2)))} for _ in range(count)]


class Served:
    """A tiny model, its adapters, and both ways to run them."""

    def __init__(self, architecture, folder):
        self.folder = save_model(architecture, folder / "model")
        self.sources = save_adapters(self.folder, folder)
        self.model = load_all(self.folder, self.sources)

    def check(self, llm, prompts, steerings, **options):
        for prompt, steering, answer in zip(
            prompts, steerings, answers(llm, prompts, steerings, **options), strict=True
        ):
            assert_as_transformers(self.model, prompt, answer, steering)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Served("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(llama):
    with engine_of(llama.folder, llama.sources, {"YAPO_MAX_ADAPTERS": "6"}) as engine:
        yield engine


EACH = [{}, *({name: multiplier} for name in ADAPTERS for multiplier in (1.0, -1.5, 0.4))]


@pytest.mark.feature("vLLM", "Adapters of each kind and several multipliers in one batch, chunked, as in transformers")
def test_a_mixed_batch_answers_as_transformers(llama, llm):
    llama.check(llm, drawn_prompts(len(EACH)), EACH)


@pytest.mark.feature("vLLM", "Several adapters in one request, also with different positions")
def test_several_adapters_of_a_request_add_up(llama, llm):
    steerings = [
        {"both": 1.0, "dense": -0.5},
        {"answers": 1.0, "last": -1.0, "gated": 0.5},
        {"last": 2.0, "both": -1.0},
    ]
    llama.check(llm, drawn_prompts(3, seed=1), steerings)


@pytest.mark.feature("vLLM", "Requests without steering, beside steered ones: the same bits")
def test_other_requests_of_a_batch_keep_their_bits(llm):
    prompts = drawn_prompts(16, seed=2)
    plain = answers(llm, prompts, [{}] * 16)
    llm.reset_prefix_cache()
    mixed = answers(llm, prompts, [{} if place % 2 else {"both": -2.0, "answers": 1.0} for place in range(16)])
    llm.reset_prefix_cache()

    def bits(completion):
        return [
            (token, step[token].logprob) for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
        ]

    assert [bits(completion) for completion in plain[1::2]] == [bits(completion) for completion in mixed[1::2]]
    assert [bits(completion) for completion in plain[::2]] != [bits(completion) for completion in mixed[::2]]


@pytest.mark.feature("vLLM", "A prefix cached under one steering is not used under another")
def test_prefixes_are_used_again_under_the_same_steering_alone(llama, llm):
    (prompt,) = drawn_prompts(1, seed=3, longest=100)
    prompt = (prompt * 100)[:160]
    seen = set()
    for steering in ({}, {"both": 1.0}, {"both": -1.0}, {}, {"gated": 1.0}, {"both": 1.0}, {"both": 1.0, "gated": 1.0}):
        (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters(steering), use_tqdm=False)
        assert_as_transformers(llama.model, prompt, output.outputs[0], steering)
        key = tuple(steering.items())
        assert (output.num_cached_tokens > 100) == (key in seen)
        seen.add(key)


@pytest.mark.parametrize("name", ["answers", "last", "both"])
def test_an_answer_that_becomes_a_prompt_is_steered_as_a_prompt(llama, llm, name):
    (prompt,) = drawn_prompts(1, seed=4, longest=60)
    prompt = (prompt * 60)[:60]
    for _ in range(3):
        (answer,) = answers(llm, [prompt], [{name: 1.5}], tokens=40)
        assert_as_transformers(llama.model, prompt, answer, {name: 1.5})
        prompt = [*prompt, *answer.token_ids]


@pytest.mark.feature("vLLM", "A thousand requests with random adapters and multipliers")
def test_a_thousand_requests(llama, llm):
    prompts = drawn_prompts(1000, seed=5, longest=24)
    llama.check(llm, prompts, drawn_steerings(1000, list(ADAPTERS), seed=6), tokens=4)


def test_prompt_log_probabilities_are_steered(llama, llm):
    (prompt,) = drawn_prompts(1, seed=7)
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}], parameters({"both": 1.0}, prompt_logprobs=0), use_tqdm=False
    )
    wanted = expected(llama.model, prompt[:1], prompt[1:], {"both": 1.0})
    found = [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    torch.testing.assert_close(torch.tensor(found), wanted[range(len(found)), prompt[1:]], atol=1e-3, rtol=1e-3)


def test_several_samples_of_a_request_are_steered(llama, llm):
    (prompt,) = drawn_prompts(1, seed=8)
    # Without a seed of its own: on CPUs vLLM cannot rewind a request's generator.
    settings = parameters({"both": -1.0}, n=3, temperature=1.0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    for completion in output.outputs:
        answer = list(completion.token_ids)
        wanted = expected(llama.model, prompt, answer, {"both": -1.0})[range(len(answer)), answer]
        found = [step[token].logprob for token, step in zip(answer, completion.logprobs, strict=True)]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("asked", ["rude", {"adapter": "both", "multiplier": "1"}, "both=nan", 3, {"both": 1}])
def test_a_bad_request_is_refused_and_the_engine_lives_on(llama, llm, asked):
    with pytest.raises(VLLMValidationError, match="yapo"):
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args={"yapo": asked}), use_tqdm=False)
    llama.check(llm, [[5, 6, 7]], [{"both": 1.0}])


def test_adapters_are_loaded_and_unloaded_at_run_time(llama, llm):
    assert set(list_adapters(llm)) == set(ADAPTERS)
    more = load_adapter(llm, "more", llama.sources["both"])
    assert (more.layers, more.slot) == ((1, 2), 5)
    prompts = drawn_prompts(2, seed=9)
    one, other = answers(llm, prompts[:1] * 2, [{"more": 1.0}, {"both": 1.0}])
    assert one.token_ids == other.token_ids
    # Under the same name now another adapter: the prefix of the first is not used.
    unload_adapter(llm, "more")
    load_adapter(llm, "more", llama.sources["gated"])
    one, other = answers(llm, prompts[:1] * 2, [{"more": 1.0}, {"gated": 1.0}])
    assert one.token_ids == other.token_ids
    unload_adapter(llm, "more")
    with pytest.raises(VLLMValidationError, match="no adapter 'more'"):
        answers(llm, prompts, [{"more": 1.0}] * 2)
    for name, source, message in [
        ("more", f"{llama.sources['both']}-not", "No adapter can be read from"),
        ("a,b", llama.sources["both"], "must be printable"),
    ]:
        with pytest.raises(YaPOError, match=message):
            load_adapter(llm, name, source)
    with pytest.raises(ConfigError, match="no adapter 'more'"):
        unload_adapter(llm, "more")
    assert set(list_adapters(llm)) == set(ADAPTERS)
    llama.check(llm, prompts, [{"both": 1.0}, {"gated": -1.0}])


@pytest.mark.feature("vLLM", "Llama, Qwen, Gemma and GPT-2, compiled, and transformers' own models as vLLM runs them")
@pytest.mark.parametrize("architecture", [*(name for name in CONFIGS if name != "llama"), "transformers"])
def test_other_architectures_answer_as_transformers(tmp_path, architecture):
    served = Served("llama" if architecture == "transformers" else architecture, tmp_path)
    options = {"model_impl": "transformers"} if architecture == "transformers" else {}
    with engine_of(served.folder, served.sources, **options) as llm:
        served.check(llm, drawn_prompts(len(EACH)), EACH)


@pytest.mark.feature("vLLM", "LoRA requests beside, or under, steering")
def test_lora_requests_are_steered_too(llama, tmp_path):
    torch.manual_seed(3)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama.folder),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path / "lora")
    merged = tmp_path / "merged"
    lora.merge_and_unload().save_pretrained(merged)
    prompts, steerings = drawn_prompts(4, seed=10), [{}, {"both": 1.0}, {"dense": -1.0}, {"last": 1.0, "gated": -1.0}]
    request = LoRARequest("lora", 1, str(tmp_path / "lora"))
    with engine_of(llama.folder, llama.sources, enable_lora=True, max_lora_rank=8) as llm:
        # In batches of their own: on a CPU, vLLM 0.32 lets a LoRA request disturb others, steered or not.
        for model, lora_request in ((llama.model, None), (load_all(merged, llama.sources), request)):
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            settings = [parameters(steering) for steering in steerings]
            outputs = llm.generate(inputs, settings, lora_request=lora_request, use_tqdm=False)
            for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
                assert_as_transformers(model, prompt, output.outputs[0], steering)


@pytest.mark.feature("vLLM", "Tensor parallelism, on two processes")
def test_two_processes_that_share_each_block_steer_alike(llama):
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with engine_of(llama.folder, llama.sources, threads, tensor_parallel_size=2, enforce_eager=True) as llm:
        llama.check(llm, drawn_prompts(6, seed=11), [{}, *EACH[1::3]])


def test_a_server_that_was_not_started_to_steer_says_so(llama):
    with engine_of(llama.folder, {}, enforce_eager=True) as llm:
        assert list_adapters(llm) == {}
        with pytest.raises(VLLMValidationError, match=r"no adapter 'both'\. Served: none"):
            answers(llm, [[5, 6]], [{"both": 1.0}])
        with pytest.raises(ConfigError, match="start it with YAPO_ADAPTERS"):
            load_adapter(llm, "both", llama.sources["both"])
        llama.check(llm, [[5, 6, 7]], [{}])


def test_bad_settings_fail_before_a_worker_starts(llama):
    with pytest.raises(ConfigError, match="'gone' cannot be served"), engine_of(llama.folder, {"gone": "/no/such"}):
        pass
