"""Calls that overlap in threads or tasks: right answers or an error, and never a model that stays steered."""

import asyncio
import threading

import pytest
import torch
from damage import code_of, make_adapter
from tiny import make_sae, random_code, set_code

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig, set_multiplier, steering

IDS = torch.tensor([[11, 12, 13]])


def make_model():
    model = make_adapter().eval()
    model.get_parameter(code_of(model)).data.mul_(20)
    return model


def ask(model, **kwargs):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options, **kwargs)[0].tolist()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def while_calling(model, act, call):
    """Runs `act` in another thread within the first forward pass of a call of this one; returns what both gave."""
    errors, done = [], []

    def run():
        try:
            act()
        except Exception as error:
            errors.append(error)

    def hook(*_):
        if not done:
            done.append(True)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    handle = model.get_input_embeddings().register_forward_hook(hook)
    answer = call(model)
    handle.remove()
    return answer, errors


def disable(model):
    with model.disable_adapter():
        pass


CHANGES = {
    "generate with another multiplier": lambda model: ask(model, multipliers=-2.0),
    "generate": ask,
    "steering": lambda model: steering(model, 0.5).__enter__(),
    "adapter_names": lambda model: model(IDS, adapter_names=["__base__"]),
    "set_multiplier": lambda model: set_multiplier(model, 0.5),
    "disable_adapter": disable,
    "set_adapter": lambda model: model.set_adapter("other"),
}


@pytest.mark.feature("Beyond PEFT", "Overlapping calls of one model in threads or tasks", refused="named")
@pytest.mark.parametrize(
    ("name", "during"),
    [*((name, "generate") for name in [*CHANGES, "a forward pass"]), *((name, "a forward pass") for name in CHANGES)],
)
def test_calls_and_changes_within_the_call_of_another_thread_are_refused(name, during):
    model = make_model()
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae()))
    calls = {"generate": lambda model: ask(model, multipliers=2.0), "a forward pass": lambda m: logits(m).tolist()}
    call = calls[during]
    alone, before = call(model), logits(model)
    act = {**CHANGES, "a forward pass": logits}[name]
    answer, errors = while_calling(model, lambda: act(model), call)
    assert [type(error) for error in errors] == [UnsupportedOperationError]
    assert "Another call is steering this model" in str(errors[0])
    assert answer == alone
    assert torch.equal(logits(model), before)


def test_an_interrupted_forward_pass_leaves_nothing_behind():
    model, found = make_model(), []
    expected = ask(model, multipliers=-2.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, labels=IDS, multipliers=2.0)
    handle.remove()
    thread = threading.Thread(target=lambda: found.append(ask(model, multipliers=-2.0)))
    thread.start()
    thread.join()
    assert found == [expected]
    logits(model)
    assert model.base_model.model.model.layers[2].yapo.call.labels is None


def test_a_call_within_a_call_leaves_the_multipliers_of_the_outer_one():
    model = make_model()
    with torch.no_grad():
        expected = model(IDS, multipliers=2.0).logits
    inner = []

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[0] = logits(model)

    handle = model.get_input_embeddings().register_forward_hook(call_again)
    with torch.no_grad():
        found = model(IDS, multipliers=2.0).logits
    handle.remove()
    assert torch.equal(inner[0], logits(model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("multipliers", [(2.0, -2.0), (2.0, None), (None, 2.0), (None, None)])
def test_forward_passes_of_two_threads_are_right_or_refused(multipliers):
    model = make_model()
    first, second = ({} if value is None else {"multipliers": value} for value in multipliers)

    def run(**kwargs):
        with torch.no_grad():
            return model(IDS, **kwargs).logits

    expected, others, found = [run(**first), run(**second)], [], []

    def other():
        try:
            found.append(run(**second))
        except UnsupportedOperationError as error:
            others.append(error)

    def hook(*_):
        if not found and not others and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.get_input_embeddings().register_forward_hook(hook)
    assert torch.equal(run(**first), expected[0])
    handle.remove()
    assert len(others) == (multipliers != (None, None))
    assert all(torch.equal(logits, expected[1]) for logits in found)
    # Nothing is left of either.
    assert torch.equal(run(**second), expected[1])
    assert torch.equal(run(**first), expected[0])


def test_many_threads_get_right_answers_or_errors():
    model = make_model()
    alone = {multiplier: ask(model, multipliers=multiplier) for multiplier in (-2.0, 0.0, 2.0)}
    assert len(set(map(tuple, alone.values()))) == 3
    wrong, errors = [], []

    def work(multiplier):
        for _ in range(4):
            try:
                wrong.append(ask(model, multipliers=multiplier) != alone[multiplier])
            except UnsupportedOperationError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(multiplier,)) for multiplier in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) + len(errors) == 12
    assert not any(wrong)
    assert ask(model, multipliers=2.0) == alone[2.0]


def test_a_thread_that_was_started_to_stream_is_steered():
    model, found = make_model(), []
    expected = ask(model, multipliers=-2.0)
    with steering(model, -2.0):
        thread = threading.Thread(target=lambda: found.append(ask(model)))
        thread.start()
        thread.join()
    assert found == [expected]


@pytest.mark.parametrize("act", [ask, logits, lambda model: steering(model, 0.5).__enter__()])
def test_tasks_do_not_run_in_the_steering_of_others(act):
    model = make_model()
    before = logits(model)

    async def steered(entered, leave):
        with steering(model, 2.0):
            entered.set()
            await leave.wait()

    async def run():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(steered(entered, leave))
        await entered.wait()
        try:
            with pytest.raises(UnsupportedOperationError, match="Another call is steering this model"):
                act(model)
        finally:
            leave.set()
            await task

    asyncio.run(run())
    assert torch.equal(logits(model), before)


def test_blocks_that_end_in_another_order_leave_nothing_behind():
    model = make_model()
    before = logits(model)
    with steering(model, 2.0):
        at_two = logits(model)
    outer, inner = steering(model, -1.0), steering(model, 2.0)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(logits(model), at_two)
    inner.__exit__(None, None, None)
    assert torch.equal(logits(model), before)


def test_other_adapters_do_not_become_active_within_steering():
    model = make_model()
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(seed=9), "other")
    with steering(model, 2.0):
        model.set_adapter("default")
        with pytest.raises(ConfigError, match=r"set_adapter\('other'\) within steering\(\)"):
            model.set_adapter("other")
    model.set_adapter("other")
    assert model.base_model.active_adapters == ["other"]


def test_one_multiplier_steers_all_rows():
    model = make_model()
    ids = IDS.repeat(3, 1)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
    found = model.generate(**options, do_sample=False, multipliers=-2)
    assert torch.equal(found, model.generate(**options, do_sample=False, multipliers=[-2.0] * 3))
    assert not torch.equal(found, model.generate(**options, do_sample=False))
    with torch.no_grad():
        found = model(ids, multipliers=0.5).logits
    with steering(model, 0.5):
        torch.testing.assert_close(found, model(ids).logits.detach())


@pytest.mark.parametrize("multiplier", [1e39, 10**400, -1e300, [None, 1.0], [1e300], 1j, [True], "1"], ids=str)
def test_multipliers_that_are_no_finite_numbers_are_refused(multiplier):
    model = make_model()
    with pytest.raises(ConfigError, match=r"multipliers?="), steering(model, multiplier):
        pass
    with pytest.raises(ConfigError, match="multipliers="):
        ask(model, multipliers=multiplier)


@pytest.mark.parametrize("names", [[], ["__base__"], ["default"] * 3])
def test_another_number_of_adapter_names_than_rows_is_refused(names):
    with pytest.raises(ConfigError, match=f"adapter_names has {len(names)} values for a batch of 2 rows"):
        make_model()(IDS.repeat(2, 1), adapter_names=names)


def test_adapter_names_that_are_a_text_are_refused():
    with pytest.raises(ConfigError, match="adapter_names='default': must be a list with a name for each row"):
        make_model()(IDS, adapter_names="default")
