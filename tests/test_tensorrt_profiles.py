"""Ranges and optimization profiles: pure functions, no TensorRT."""

from __future__ import annotations

import pytest

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.tensorrt.profiles import Profile, Range, check, decode_and_prefill

INPUTS = {
    "input_ids": ("batch", "sequence"),
    "past_lengths": ("batch",),
    "lengths": ("batch",),
    "budgets": (6,),
    "past_key_values.0.key": ("batch", 2, 64, 16),
    "past_key_values.0.value": ("batch", 2, 64, 16),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:8:64", Range(1, 8, 64)),
        ("8", Range(8, 8, 8)),  # one number: a static size
        (" 1 : 8 : 8 ", Range(1, 8, 8)),  # what a person types; opt == max
    ],
)
def test_parse(text, expected):
    assert Range.parse(text) == expected
    assert Range.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "1:8", "1:8:64:128", "a", "1:x:3", "-1:2:3", "1.5", "1::3", "٣"])
def test_parse_names_the_text_and_the_form(text):
    with pytest.raises(UsageError, match="write MIN:OPT:MAX") as caught:
        Range.parse(text)
    assert repr(text)[:20] in str(caught.value)


@pytest.mark.parametrize("text", ["1:8:1000000000", "9" * 5000])  # Python makes no number of 5000 digits
def test_a_range_too_large(text):
    with pytest.raises(UsageError, match="is too large: its numbers are at most 999999999"):
        Range.parse(text)
    assert Range.parse("999999999").max == 999_999_999


@pytest.mark.parametrize("text", ["8:4:16", "1:8:4", "0:1:2", "0"])
def test_range_rule(text):
    with pytest.raises(UsageError, match="1 <= MIN <= OPT <= MAX"):
        Range.parse(text)


def test_decode_and_prefill():
    decode, prefill = decode_and_prefill(
        INPUTS, decode_batch=Range(1, 8, 64), prefill_batch=Range(1, 2, 4), prefill_length=Range(2, 16, 64)
    )
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert decode.shapes["input_ids"] == ((1, 1), (8, 1), (64, 1))
    assert decode.shapes["past_lengths"] == ((1,), (8,), (64,))
    assert decode.shapes["past_key_values.0.key"] == ((1, 2, 64, 16), (8, 2, 64, 16), (64, 2, 64, 16))
    assert prefill.shapes["input_ids"] == ((1, 2), (2, 16), (4, 64))
    assert "budgets" not in decode.shapes  # static: no profile needed
    check([decode, prefill], INPUTS)


def test_prefill_longer_than_the_cache():
    with pytest.raises(UsageError, match=r"65 tokens .*1:16:65.* cache of 64"):
        decode_and_prefill(
            INPUTS, decode_batch=Range(1, 1, 1), prefill_batch=Range(1, 1, 1), prefill_length=Range(1, 16, 65)
        )


@pytest.mark.parametrize("name", ["tokens", "?"])  # a name that is not ours, and no name at all
def test_foreign_dynamic_dimension(name):
    one = Range(1, 1, 1)
    with pytest.raises(TensorRTError, match=r"input mask .*batch and sequence only"):
        decode_and_prefill({**INPUTS, "mask": (name,)}, decode_batch=one, prefill_batch=one, prefill_length=one)


SHAPES = {"input_ids": ((1, 1), (8, 1), (64, 1)), "past_lengths": ((1,), (8,), (64,)), "lengths": ((1,), (8,), (64,))}
SHAPES |= {f"past_key_values.0.{part}": ((1, 2, 64, 16), (8, 2, 64, 16), (64, 2, 64, 16)) for part in ("key", "value")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nothing": ((1,), (1,), (1,))}, "names the input nothing, which the graph lacks"),
        ({"lengths": ((2,), (1,), (3,))}, r"lengths \[batch\]: min \[2\], opt \[1\], max \[3\].* min <= opt <= max"),
        ({"lengths": ((1, 1), (1, 1), (1, 1))}, r"lengths \[batch\]: the shape \[1, 1\] does not fit"),  # rank
        ({"past_key_values.0.key": ((1, 3, 64, 16),) * 3}, r"the shape \[1, 3, 64, 16\] does not fit"),  # static dim
    ],
)
def test_check_names_what_does_not_fit(change, message):
    check([Profile("mine", SHAPES)], INPUTS)
    with pytest.raises(UsageError, match=f"profile mine.* {message}"):
        check([Profile("mine", {**SHAPES, **change})], INPUTS)


def test_check_missing():
    with pytest.raises(UsageError, match="profile mine lacks the dynamic input input_ids"):
        check([Profile("mine", {})], INPUTS)
    with pytest.raises(UsageError, match="no optimization profile was given"):
        check([], INPUTS)
    check([], {"budgets": (6,)})  # nothing is dynamic, so none is needed
