"""What is done to logits before a token is drawn, against transformers' own processors and OpenAI's formula."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_serve_service import Served
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from lynx_trt.artifact import Artifact
from lynx_trt.runtime import draws as device
from lynx_trt.runtime.backend import NOT_FINITE, NOT_WANTED, Array
from lynx_trt.runtime.edits import Edits, History
from lynx_trt.runtime.sampling import Sampling, draw, draws_of
from lynx_trt.serving.settings import Settings

VOCABULARY = 50
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal(VOCABULARY)).astype(np.float32)
PROMPT, ANSWER = [3, 9, 9, 20], [20, 7, 7, 7, 41]


def edited(sampling: Sampling, allowed: Array | None = None) -> Array:
    """The logits before the token after PROMPT and ANSWER."""
    history = History(PROMPT, sampling)
    for token in ANSWER:
        history.take(token)
    before = LOGITS.copy()
    made = history.edits(allowed).apply(LOGITS)
    assert np.array_equal(before, LOGITS)  # they may be the backend's own
    return made


def only(*tokens: int) -> Edits:
    """Nothing but a guide's tokens."""
    allowed = np.zeros(VOCABULARY, np.bool_)
    allowed[list(tokens)] = True
    return History((), Sampling()).edits(allowed)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition(penalty: float) -> None:
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    wanted = processor(torch.tensor([PROMPT + ANSWER]), torch.tensor(LOGITS)[None].clone())[0].numpy()
    np.testing.assert_allclose(edited(Sampling(repetition_penalty=penalty)), wanted, rtol=1e-6)


def test_presence_and_frequency() -> None:
    """Of the answer alone, and by how often it has them; `c * frequency + (c > 0) * presence` is taken away."""
    wanted = LOGITS.copy()
    for token, count in Counter(ANSWER).items():
        wanted[token] -= 0.3 * count + 1.5
    np.testing.assert_allclose(edited(Sampling(presence_penalty=1.5, frequency_penalty=0.3)), wanted, rtol=1e-6)


def test_biases() -> None:
    wanted = LOGITS.copy()
    wanted[[0, 7]] += [100, -2.5]
    assert np.array_equal(edited(Sampling(logit_bias=((0, 100.0), (7, -2.5)))), wanted)


def test_all_of_them() -> None:
    """Biases, repetition, presence and frequency, and what isn't allowed stays so whatever its bias."""
    allowed = np.ones(VOCABULARY, np.bool_)
    allowed[5] = False
    sampling = Sampling(
        repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-0.5, logit_bias=((5, 100.0), (7, 1.0))
    )
    made = edited(sampling, allowed)
    biased = LOGITS[7] + np.float32(1)
    wanted = (biased / 1.5 if biased > 0 else biased * 1.5) - (1.0 - 3 * 0.5)
    assert made[7] == pytest.approx(wanted, rel=1e-6)
    assert made[5] == -np.inf
    assert made[1] == LOGITS[1]


@pytest.mark.parametrize(("min_p", "temperature"), [(0.1, 1.0), (0.02, 0.6), (0.3, 1.7), (1.0, 1.0)])
def test_min_p(min_p: float, temperature: float) -> None:
    scores = MinPLogitsWarper(min_p)(torch.zeros(1, 1), torch.tensor(LOGITS)[None] / temperature)
    wanted = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    way = Sampling(temperature, min_p=min_p)
    drawn = {int(draw(LOGITS[None], draws_of(1, [(0, way, np.random.default_rng(n))]))[0]) for n in range(2000)}
    assert drawn <= wanted
    assert len(drawn) == len(wanted) or min_p < 0.1  # the rarest may not have come up
    assert draw(LOGITS[None], draws_of(1, [(0, Sampling(min_p=min_p), np.random.default_rng(0))]))[0] == LOGITS.argmax()


@pytest.mark.parametrize("way", [Sampling(0.9, 0.95, top_k=40), Sampling(0.9, 0.95), Sampling(0.9, top_k=7)])
def test_among_few_that_are_left(way: Sampling) -> None:
    """The same draws as from logits that have the others at -inf from the start."""
    logits = (2 * RNG.standard_normal(VOCABULARY)).astype(np.float32)
    edits = only(*range(0, VOCABULARY, 3))
    masked = edits.apply(logits)[None]
    for seed in range(50):
        made = [(0, way, np.random.default_rng(seed))], [(0, way, np.random.default_rng(seed))]
        assert draw(logits[None], draws_of(1, made[0], {0: edits})) == draw(masked, draws_of(1, made[1]))


def test_min_p_before_the_others() -> None:
    """Of two tokens that it leaves, with 2/3 and 1/3, top-p 0.6 leaves the first alone."""
    logits = np.log(np.array([[0.4, 0.2, 0.19, 0.11, 0.1]], np.float32))
    for top_p, wanted in ((0.6, {0}), (0.7, {0, 1})):
        way = Sampling(1.0, top_p, min_p=0.49)
        assert {int(draw(logits, draws_of(1, [(0, way, np.random.default_rng(n))]))[0]) for n in range(60)} == wanted


def test_draws_of_what_is_allowed() -> None:
    """Greedy, at random, among top-k and top-p; a row whose logits are no numbers is told as such."""
    logits = RNG.standard_normal((6, VOCABULARY)).astype(np.float32)
    logits[4, 7] = np.nan
    ways = [Sampling(), Sampling(1.0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.01), Sampling(1.0), Sampling()]
    rows = [(row, way, way.generator(row)) for row, way in enumerate(ways)]
    edits = only(3, 8, 20)
    tokens = draw(logits, draws_of(6, rows, dict.fromkeys(range(5), edits)))
    best = [int(np.where(edits.allowed, logits[row], -np.inf).argmax()) for row in range(5)]
    assert tokens[[0, 2, 3]].tolist() == [best[row] for row in (0, 2, 3)]
    assert tokens[1] in (3, 8, 20)
    assert tokens[4] == NOT_FINITE
    assert tokens[5] == logits[5].argmax()
    many = [
        draw(logits[:1], draws_of(1, [(0, Sampling(5.0), np.random.default_rng(n))], {0: edits}))[0] for n in range(40)
    ]
    assert set(many) == {3, 8, 20}


def test_draws_on_a_gpu_leave_such_rows_to_the_host() -> None:
    """Rows with edits, and those with a min_p, unless they are greedy."""
    logits = np.stack([np.arange(VOCABULARY, dtype=np.float32)] * 5)
    ways = [(0, Sampling()), (1, Sampling()), (2, Sampling(1.0, min_p=1.0)), (3, Sampling(min_p=0.5))]
    made = draws_of(5, [(row, way, way.generator(row)) for row, way in ways], {1: only(9)})
    asked: list[int] = []
    buffers = SimpleNamespace(logits_of=lambda row: (asked.append(row), logits[row : row + 1])[1])
    found = device.DeviceDraws.finish(SimpleNamespace(_buffers=buffers), np.array([4, 5, 6, 7, 8]), made)  # type: ignore[arg-type]
    assert found.tolist() == [4, 9, 49, 7, NOT_WANTED]
    assert sorted(asked) == [1, 2]


# --- Served.


@pytest.fixture(scope="module")
def served(text_artifact: Artifact) -> Iterator[Served]:
    made = Served(text_artifact, Settings(slots=4, quality="max"))
    yield made
    made.service.close()


def test_a_served_answer(served: Served) -> None:
    """A token that a bias excludes doesn't come; with a penalty no token comes twice; others in the batch are free."""
    asked = {"text_input": "def f", "max_tokens": 30}
    alone = served.ask(**asked).wait().text
    letters = {letter for letter in alone if letter.isascii()}
    (letter_a, *banned) = (served.parser.tokenizer.encode(letter)[0] for letter in ("A", *letters))
    biases = json.dumps({str(token): -100 for token in banned})
    replies = [
        served.ask(**asked),
        served.ask(**asked, logit_bias=biases),
        served.ask(**asked, frequency_penalty=2.0, presence_penalty=2.0, logit_bias=f'{{"{letter_a}": 50}}'),
        served.ask(**asked, guide='{"regex": "[ab]{12}"}', repetition_penalty=10.0),
    ]
    free, without, varied, guided = (reply.wait() for reply in replies)
    assert [reply.error for reply in (free, without, varied, guided)] == [None] * 4
    assert free.text == alone
    assert len(letters) > 3
    assert not set(without.text) & letters
    # What 50 is worth, less 4 for the first of them and 2 for each other one, is soon as good as any.
    assert 1 < varied.text.count("A") < 30
    assert set(guided.text) <= {"a", "b"}
    assert len(guided.text) == 12


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_p": -0.1}, "min-p is -0.1"),
        ({"min_p": float("nan")}, "min-p is nan"),
        (
            {"repetition_penalty": 1e-40},
            "it must be from 0.1 to 10, and 1 is none",
        ),
        ({"repetition_penalty": float("inf")}, "the repetition penalty is inf"),
        ({"presence_penalty": 2.5}, "the presence penalty is 2.5; it must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "the frequency penalty is nan"),
        ({"logit_bias": '{"5": 101}'}, "the logit bias of token 5 is 101.0; it must be from -100 to 100"),
        ({"logit_bias": '{"5": NaN}'}, "the logit bias of token 5 is nan"),
        ({"logit_bias": '{"256": 1}'}, "logit_bias has the token 256, and the model has the tokens 0 to 255"),
        ({"logit_bias": '{"x": 1}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": "[1]"}, "it must be a JSON object of token ids"),
        ({"logit_bias": "{"}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"5": null}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"5": true}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"5": "3"}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{" 5": 1}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"1_0": 1}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"-1": 1}'}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"5": 1' + "0" * 400 + "}"}, "it must be a JSON object of token ids"),
        ({"logit_bias": '{"5": 1, "05": -1}'}, "logit_bias has a token twice"),
    ],
)
def test_mistakes(served: Served, values: dict[str, Any], words: str) -> None:
    error = served.ask(text_input="x", **values).wait().error
    assert error is not None
    assert error[0] == "invalid"
    assert words in error[1]
