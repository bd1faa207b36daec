"""Asking a served model for text: HTTP with nothing but Python's own library, and gRPC with tritonclient.

python examples/serving_client.py "def add(a, b):" --max-tokens 64
python examples/serving_client.py "def add(a, b):" --grpc --quality fast --temperature 0.8 --seed 1
python examples/serving_client.py "What is a mixture of experts?" --chat --model MODEL    # a chat model

A server that `python -m lynx_trt.serve ARTIFACT --start` has started listens where this looks.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import queue
import sys
from collections.abc import Iterator
from typing import Any


def message(text: str) -> dict[str, str]:
    """What asks a chat model, to be among the settings in the place of a text."""
    return {"messages": json.dumps([{"role": "user", "content": text}])}


def generate(address: str, model: str, text: str | None, **settings: Any) -> dict[str, Any]:
    """One answer, when it is whole. `settings` are the model's inputs: max_tokens, quality, stop, messages and so on.

    Raises:
        RuntimeError: the server refused the request; the message is its own.
    """
    connection = http.client.HTTPConnection(address)
    connection.request("POST", f"/v2/models/{model}/generate", json.dumps(_inputs(text, settings)), HEADERS)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != http.client.OK:
        raise RuntimeError(_error(body))
    answer: dict[str, Any] = json.loads(body)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _inputs(text: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    return settings if text is None else {"text_input": text, **settings}


def _error(body: bytes) -> str:
    """The server's own sentence, or the beginning of whatever else came."""
    try:
        return str(json.loads(body.removeprefix(b"data: "))["error"])
    except (ValueError, KeyError, TypeError):
        return f"no answer of a model: {body[:80]!r}"


def stream(address: str, model: str, text: str | None, **settings: Any) -> Iterator[dict[str, Any]]:
    """Responses as they come; the last one has `finish_reason` and the request's statistics.

    Whoever stops to iterate closes the connection, and the server stops to generate.

    Raises:
        RuntimeError: the server refused the request, or ended it; the message is its own.
    """
    connection = http.client.HTTPConnection(address)
    body = json.dumps({"stream": True, **_inputs(text, settings)})
    connection.request("POST", f"/v2/models/{model}/generate_stream", body, HEADERS)
    try:
        response = connection.getresponse()
        if response.status != http.client.OK:  # the server knows no such model, say
            raise RuntimeError(_error(response.read()))
        for line in response:
            if line.startswith(b"data: "):
                answer = json.loads(line[6:])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                yield answer
    finally:
        connection.close()


HEADERS = {"Content-Type": "application/json"}
TYPES = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "chat_options": "BYTES",
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "min_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "logit_bias": "BYTES",
    "seed": "INT64",
    "stop": "BYTES",
    "quality": "BYTES",
    "stream": "BOOL",
    "deadline": "FP32",
}


def stream_grpc(address: str, model: str, text: str | None, **settings: Any) -> Iterator[dict[str, Any]]:
    """The same over gRPC; needs `pip install "lynx-trt[serve]"`.

    Raises:
        RuntimeError: the server refused the request, or ended it; the message is its own.
    """
    import numpy as np
    from tritonclient import grpc, utils

    inputs = []
    for name, value in {"stream": True, **_inputs(text, settings)}.items():
        values = [item.encode() if isinstance(item, str) else item for item in (value if name == "stop" else [value])]
        tensor = grpc.InferInput(name, [len(values)], TYPES[name])
        dtype = np.object_ if TYPES[name] == "BYTES" else utils.triton_to_np_dtype(TYPES[name])
        inputs.append(tensor.set_data_from_numpy(np.array(values, dtype=dtype)))
    responses: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        answer: dict[str, Any] = {}
        try:
            # A stream that has ended already has told the callback why.
            with contextlib.suppress(utils.InferenceServerException):
                client.async_stream_infer(model, inputs)
            while "finish_reason" not in answer:
                result, error = responses.get()
                if error is not None:
                    raise RuntimeError(error.message())
                answer = {output.name: _value(result.as_numpy(output.name)) for output in result.get_response().outputs}
                yield answer
        finally:
            # Without this the server would go on for a client that has stopped to listen.
            client.stop_stream(cancel_requests="finish_reason" not in answer)


def _value(array: Any) -> Any:
    values = [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
    return values[0] if len(values) == 1 else values


def main() -> None:
    """Print an answer as it comes, and what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--model", default="lynx-tiny")
    parser.add_argument("--address", help="HOST:PORT [default: 127.0.0.1:8000, with --grpc 127.0.0.1:8001]")
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--chat", action="store_true", help="the text is a message to a chat model")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", help="max, balanced, fast, or a fraction of the experts")
    options = parser.parse_args()
    settings = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
    if options.quality:
        settings["quality"] = options.quality
    address = options.address or ("127.0.0.1:8001" if options.grpc else "127.0.0.1:8000")
    answer: dict[str, Any] = {}
    text_began = False
    text = options.text
    if options.chat:
        text, settings = None, settings | message(text)
    responses = (stream_grpc if options.grpc else stream)(address, options.model, text, **settings)
    try:
        for answer in responses:
            sys.stdout.write(answer["text_output"] if text_began else (text or "") + answer["text_output"])
            sys.stdout.flush()
            text_began = True
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"error: no server answers at {address}: {error}; start one, or say where it is with --address")
    each = answer["token_seconds"] * 1e3
    print(f"\n[{answer['finish_reason']}: {answer['output_tokens']} tokens, {each:.1f} ms each]", file=sys.stderr)


if __name__ == "__main__":
    main()
