"""Tokenizer, generation, chat, and logits."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from conftest import PROMPT

import stb

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def test_the_tokenizer_encodes_and_decodes(model: stb.Model) -> None:
    tokenizer = model.tokenizer
    plain = tokenizer.encode(PROMPT, add_bos=False)
    assert tokenizer.decode(plain) == PROMPT
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    assert tokenizer.encode(PROMPT) == bos + plain
    [eos] = tokenizer.eos
    text = tokenizer.token(eos)
    assert text is not None and tokenizer.token_id(text) == eos
    assert tokenizer.token(10**9) is None and tokenizer.token_id("no such token") is None
    assert tokenizer.vocab_size == model.logits(plain[:1]).shape[1]


def test_greedy_text_is_that_of_the_program(
    quill: Path, model: stb.Model, run: Callable[..., str]
) -> None:
    options = ("--temp", 0, "-n", 60, "--quiet")
    printed = run("stb-run", quill, "--no-template", "--prompt", PROMPT, *options)
    answer = model.generate(PROMPT, temperature=0, max_tokens=60)
    assert answer.complete() + "\n" == printed
    assert answer.finish_reason in ("length", "stop")
    # The same from token ids, and a second time.
    ids = model.tokenizer.encode(PROMPT)
    assert model.generate(ids, temperature=0, max_tokens=60).complete() == answer.text
    printed = run("stb-run", quill, "--prompt", "Tell me a story.", *options)
    assert model.chat(MESSAGES, temperature=0, max_tokens=60).complete() + "\n" == printed


def test_answers_stream(model: stb.Model) -> None:
    answer = model.generate(PROMPT, temperature=0, max_tokens=20)
    first = next(answer)
    assert first and answer.text.startswith(first)
    pieces = [first, *answer]
    assert len(pieces) > 5 and all(pieces)
    assert "".join(pieces) == answer.text == answer.complete()
    assert len(answer.tokens) == 20 and answer.finish_reason == "length"
    usage = answer.usage
    assert usage is not None and usage["completion_tokens"] == 20
    assert usage["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert list(answer) == []


def test_sampling_options_count(model: stb.Model) -> None:
    def text(**options: object) -> str:
        return model.generate(PROMPT, max_tokens=30, **options).complete()  # type: ignore[arg-type]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(top_k=1, seed=1) == text(temperature=0)
    assert text(temperature=0, repeat_penalty=1.5) != text(temperature=0)
    assert model.generate(PROMPT, max_tokens=0).complete() == ""
    whole = text(temperature=0)
    word = whole.split()[3]
    stopped = model.generate(PROMPT, max_tokens=30, temperature=0, stop=["no such text", word])
    assert stopped.complete() == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"
    assert text(temperature=0, stop=word) == stopped.text
    # Without an end token the answer goes on to the limit.
    long = model.generate(PROMPT, max_tokens=400, seed=1, ignore_eos=True)
    assert long.complete() and len(long.tokens) == 400


def test_wrong_options_are_refused(model: stb.Model) -> None:
    for options in (
        {"temperature": -1}, {"top_p": 2}, {"top_k": -2}, {"max_tokens": -2}, {"seed": -1},
        {"repeat_penalty": 0}, {"seed": 2**64},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            model.generate(PROMPT, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean temperature"):
        model.generate(PROMPT, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="stop"):
        model.generate(PROMPT, stop=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        model.generate(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        model.generate([])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.generate([10**6])
    with pytest.raises(ValueError, match="fit into the context"):
        model.generate([1] * 100_000)


def test_closing_an_answer_ends_it(quill: Path) -> None:
    model = stb.open(quill)
    with model.generate(PROMPT, ignore_eos=True) as answer:
        next(answer)
    assert list(answer) == [] and answer.finish_reason is None
    # Dropped answers free their places, so that later ones are computed at once.
    for _ in range(100):
        next(model.generate(PROMPT, ignore_eos=True))
    assert model.generate(PROMPT, temperature=0, max_tokens=3).complete()
    threads = len(os.listdir("/proc/self/task"))
    del model, answer
    gc.collect()
    assert len(os.listdir("/proc/self/task")) < threads


def test_many_answers_wait_for_each_other(model: stb.Model) -> None:
    answers = [model.generate(PROMPT, temperature=0, max_tokens=5) for _ in range(100)]
    assert len({answer.complete() for answer in answers}) == 1


def test_an_answer_outlives_its_model(quill: Path) -> None:
    with stb.open(quill) as model:
        expected = model.generate(PROMPT, temperature=0, max_tokens=20).complete()
        answer = model.generate(PROMPT, temperature=0, max_tokens=20)
    assert answer.complete() == expected
    assert stb.open(quill).generate(PROMPT, temperature=0, max_tokens=20).complete() == expected


def test_two_threads_generate_at_once(model: stb.Model) -> None:
    prompts = [PROMPT, "The cat", "One day, a girl named Lily", "Tom had a red ball"]

    def answer(prompt: str) -> str:
        return model.generate(prompt, temperature=0, max_tokens=40).complete()

    alone = [answer(prompt) for prompt in prompts]
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=prompt: together.update({p: answer(p)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


def test_the_interpreter_runs_while_the_model_computes(model: stb.Model) -> None:
    """Another thread makes progress during one call that computes for long."""
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    model.logits([1] * 512)
    stop.set()
    thread.join()
    assert ticks > 1


def test_chat_templates_make_the_prompt(model: stb.Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer.has_chat_template
    texts = ("Tell me ", "a story.")
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    prompt = tokenizer.apply_chat_template(MESSAGES)
    assert prompt == tokenizer.apply_chat_template(parts)
    assert prompt.endswith("<|user|>\nTell me a story.\n<|assistant|>\n")
    # A special token ends an answer in a chat.
    greedy = model.chat(MESSAGES, temperature=0, max_tokens=20).complete()
    assert greedy and model.generate(prompt, temperature=0, max_tokens=20).complete().startswith(greedy)


def test_wrong_messages_are_refused(model: stb.Model) -> None:
    for messages, text in (
        ([], "empty"),
        ([{"role": "nobody", "content": "x"}], "nobody"),
        ([{"content": "x"}], "role"),
        ("Hello", "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text"),
    ):
        with pytest.raises(ValueError, match=text):
            model.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        model.chat([{"role": "user", "content": b"x"}])
    with pytest.raises(stb.UnsupportedError, match="knows no tools"):
        model.chat(MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])


def test_logits_predict_what_is_generated(model: stb.Model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.tokenizer.vocab_size) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    answer = model.generate(ids, temperature=0, max_tokens=1)
    answer.complete()
    assert answer.tokens == [int(logits[-1].argmax())]
    # A token does not depend on later ones.
    np.testing.assert_allclose(model.logits(ids[:-2]), logits[:-2], rtol=0, atol=0.5)
    for wrong, text in (([], "from 1 to"), ([10**6], "outside"), ([1] * 10**5, "context")):
        with pytest.raises(ValueError, match=text):
            model.logits(wrong)


def test_exact_logits_are_those_of_the_reader_of_the_specification(quill: Path) -> None:
    from container import StbFile
    from decoder import Decoder

    with stb.open(quill, exact=True) as model:
        ids = model.tokenizer.encode(PROMPT)
        logits = model.logits(ids)
    expected = Decoder(StbFile.open(quill)).logits(ids, context=len(ids))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


def test_the_context_limits_prompt_and_answer(quill: Path) -> None:
    with stb.open(quill, context=32, threads=1) as model:
        assert (model.context, model.threads) == (32, 1)
        answer = model.generate(PROMPT, ignore_eos=True)
        answer.complete()
        assert answer.finish_reason == "context"
