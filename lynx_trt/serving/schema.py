"""Inputs and outputs of the text model, once for its configuration, its request parser and its documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: its type in the server's configuration, its shape, and what it means."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool
    meaning: str


# How errors begin that are no fault of the request: HTTP has one status for all that a model answers.
BUSY = ("the queue is full", "the deadline passed while the request waited")
FAILED = "this request failed"

INPUTS = (
    Tensor("text_input", "TYPE_STRING", (1,), True, "text to continue"),
    Tensor("messages", "TYPE_STRING", (1,), True, "or messages to a chat model, as JSON: a list of role and content"),
    Tensor("chat_options", "TYPE_STRING", (1,), True, "what its template takes beside the messages, as a JSON object"),
    Tensor("input_ids", "TYPE_INT32", (-1,), True, "or the prompt as token ids, which are taken as they are"),
    Tensor("guide", "TYPE_STRING", (1,), True, "what the answer has to be: JSON, a json_schema, a regex or a choice"),
    Tensor("parts", "TYPE_BOOL", (1,), True, "of an answer to messages: thoughts and tool calls apart from the text"),
    Tensor("max_tokens", "TYPE_INT32", (1,), True, "new tokens to write, at most"),
    Tensor("temperature", "TYPE_FP32", (1,), True, "0 is greedy, higher is more random"),
    Tensor("top_p", "TYPE_FP32", (1,), True, "draw from the likeliest tokens that reach this probability"),
    Tensor("top_k", "TYPE_INT32", (1,), True, "draw from so many likeliest tokens; 0: no limit"),
    Tensor("min_p", "TYPE_FP32", (1,), True, "draw no token of less than this share of the likeliest's probability"),
    Tensor("repetition_penalty", "TYPE_FP32", (1,), True, "divides logits of tokens in prompt and answer; 1: none"),
    Tensor("presence_penalty", "TYPE_FP32", (1,), True, "taken from the logits of tokens that the answer has"),
    Tensor("frequency_penalty", "TYPE_FP32", (1,), True, "taken from them as often as the answer has them"),
    Tensor("logit_bias", "TYPE_STRING", (1,), True, "JSON object: token ids and what is added to their logits"),
    Tensor("seed", "TYPE_INT64", (1,), True, "seed of the draws; the same seed gives the same draws"),
    Tensor("stop", "TYPE_STRING", (-1,), True, "texts that end the answer before them"),
    Tensor("ignore_eos", "TYPE_BOOL", (1,), True, "go on past the model's own end, for measuring"),
    Tensor("quality", "TYPE_STRING", (1,), True, "max, balanced, fast, or a fraction of the experts such as 0.5"),
    Tensor("stream", "TYPE_BOOL", (1,), True, "pieces as they come (true), or one answer at the end (false, default)"),
    Tensor("deadline", "TYPE_FP32", (1,), True, "seconds from arrival after which the answer ends where it is"),
)

# Inputs that leave out or change logits before a token is drawn, and their values that do nothing.
PENALTIES = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

# Every response has the first, and the parts that were asked for; the last one of a request has all the others too.
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", (1,), False, "the new text since the response before"),
    Tensor("thought_output", "TYPE_STRING", (1,), True, "of the parts: new thoughts since the response before"),
    Tensor(
        "tool_calls", "TYPE_STRING", (-1,), True, "of the parts: new tool calls, JSON with an id, a name and arguments"
    ),
    Tensor("finish_reason", "TYPE_STRING", (1,), True, "end, stop, length or deadline"),
    Tensor("prompt_tokens", "TYPE_INT32", (1,), True, "tokens of the prompt"),
    Tensor(
        "cached_tokens", "TYPE_INT32", (1,), True, "of the prompt, those that another prompt had put into the cache"
    ),
    Tensor("output_tokens", "TYPE_INT32", (1,), True, "tokens written"),
    Tensor("queue_seconds", "TYPE_FP32", (1,), True, "time waited for a slot"),
    Tensor("first_token_seconds", "TYPE_FP32", (1,), True, "time from arrival to the first token"),
    Tensor("token_seconds", "TYPE_FP32", (1,), True, "mean time of each further token"),
    Tensor("active_experts", "TYPE_FP32", (-1,), True, "active experts of each MoE layer, mean over the decode steps"),
)
