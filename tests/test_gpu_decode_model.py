"""Decoding with a whole model, without a GPU: the script in tiny, its model against transformers' own, what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dry_runs import dry_run

# isort: split
import gpu_decode_model
import gpu_plots
import gpu_qwen3_moe
import gpu_targets
import gpu_vllm
from gpu_common import Options
from gpu_decode_model import Contender
from gpu_layer import Batch, Layer, specs_of
from gpu_qwen3_moe import MODEL, Decoder

from lynx_trt.plugins.twins import experts_twin

CHOSEN = Options(Path("x.json"), 0.0, True, (MODEL,), "bfloat16", False, None)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run in tiny records, with kernels that are interpreted."""
    return dry_run("decode_model", tmp_path_factory.mktemp("model"))


def one(rows: list[dict[str, Any]], contender: str, fraction: float = 1.0) -> dict[str, Any]:
    (found,) = [each for each in rows if (each["contender"], each["fraction"]) == (contender, fraction)]
    return found


def test_every_contender_has_its_row(record: dict[str, Any]) -> None:
    """With the columns that the table and the plot read, and who isn't there with a reason."""
    rows = record["rows"]
    assert [(each["contender"], each["fraction"]) for each in rows] == [
        *(("lynx", 1.0), ("lynx", 0.5), ("grouped_mm", 1.0), ("nothing", 1.0)),
    ]
    assert record["absent"]["vllm"].startswith("vLLM is not installed")
    assert record["extra"]["kernels"] == "interpreted"
    assert record["extra"]["weights"].startswith("random")
    assert not record["left_out"]
    for each in rows:
        assert each["tokens_per_second"] == pytest.approx(1e6 * each["batch"] / each["us"], rel=0.01, abs=0.06)


def test_our_experts_are_those_of_the_model(record: dict[str, Any]) -> None:
    """All in bfloat16, of 8 bits: the logits of the whole model, and each layer by itself."""
    whole = one(record["rows"], "lynx")
    assert 0 < whole["error"] < 0.03
    assert 0 < whole["layer_error"] < 0.03
    assert whole["same_tokens"] == 1
    # Without experts they are others: what is compared is what ran.
    assert "error" not in one(record["rows"], "nothing")


def test_a_budget_is_kept_and_counted(record: dict[str, Any]) -> None:
    whole, half = one(record["rows"], "lynx"), one(record["rows"], "lynx", 0.5)
    assert whole["active"] == whole["natural"] > half["active"] == half["budget"]
    assert half["budgets_kept"] is True
    # Bytes are those of the experts in use: of two layers, 48 x 40 x 3 values of two bytes each.
    assert whole["bytes"] - half["bytes"] == 2 * (whole["active"] - half["active"]) * 48 * 40 * 3 * 2
    assert one(record["rows"], "nothing")["bytes"] == whole["bytes"] - 2 * whole["active"] * 48 * 40 * 3 * 2


@pytest.fixture(scope="module")
def model() -> Any:
    experts, _ = specs_of(MODEL, "bfloat16", dry=True)
    return gpu_qwen3_moe.build(experts, CHOSEN)


def test_a_step_is_what_the_model_itself_computes(model: Any) -> None:
    """The same weights in the model as it comes, with its own router, its own mask and a cache that it makes longer."""
    from transformers import AutoModelForCausalLM, DynamicCache

    own = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="eager")
    own.load_state_dict(model.state_dict())
    decoder = Decoder(model, 3)
    cache = DynamicCache(config=own.config)
    for number, layer in enumerate(decoder._cache.layers):
        cache.update(layer.keys[:, :, :-1].clone(), layer.values[:, :, :-1].clone(), number)
    model.set_experts_implementation("grouped_mm")
    got = decoder.step()
    with torch.no_grad():
        want = own(input_ids=decoder._ids, past_key_values=cache).logits[:, -1]
    assert cache.get_seq_length() == gpu_qwen3_moe.CONTEXT + 1
    assert (got - want).double().norm() < 0.02 * want.double().norm()
    # Set back at its start: repeated, it is the same step.
    assert torch.equal(decoder.step(), got)


def test_no_experts_are_not_the_same(model: Any) -> None:
    """The registered implementations are what is run: without experts the logits are others."""
    decoder = Decoder(model, 3)
    model.set_experts_implementation("grouped_mm")
    whole = decoder.step()
    model.set_experts_implementation("nothing")
    assert (decoder.step() - whole).double().norm() > 0.1 * whole.double().norm()


def test_a_peer_is_prepared_on_the_routing_that_was_written_down(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's own, which stays though the next contender's router writes another; its input is the step's."""

    def peer(layer: Layer, batches: list[Batch], _folder: object) -> Any:
        (batch,) = batches
        given.append(batch.index)
        weights = layer.weights["gate_up"], layer.weights["down"]
        return lambda: [experts_twin(layer.experts.form, batch.hidden, batch.index, batch.weight, *weights)]

    given: list[torch.Tensor] = []
    monkeypatch.setattr(gpu_vllm, "fused_moe", peer)
    decoder = Decoder(model, 3)
    layers = gpu_qwen3_moe.layers_of(model, *specs_of(MODEL, "bfloat16", dry=True))
    point = gpu_decode_model.Point(decoder, layers, None, {})  # type: ignore[arg-type]
    want = point.run(Contender("grouped_mm", "grouped_mm"))
    written = gpu_decode_model.vllm(point, None)
    chosen = [place.index.clone() for place in decoder.places]
    point.run(Contender("nothing", "nothing"))
    assert not torch.equal(decoder.places[-1].index, chosen[-1])
    assert all(map(torch.equal, given, chosen))
    assert gpu_decode_model.compared(point.run(written), want)["error"] < 0.02


def row(contender: str, us: float, batch: int = 16, fraction: float = 1.0, **values: Any) -> dict[str, Any]:
    base = {"model": MODEL, "contender": contender, "batch": batch, "fraction": fraction, "us": us}
    return {**base, "tokens_per_second": 1e6 * batch / us, **values}


def said_of(rows: list[dict[str, Any]]) -> str:
    found = gpu_targets.verdicts({"model": {"result": {"rows": rows}}})
    (verdict,) = [each for each in found if each.target.startswith("decoding a whole model")]
    assert verdict.passed is None
    return verdict.measured


def test_the_table_says_speed_gain_and_the_best_peer() -> None:
    rows = [row("lynx", 8000, error=0.02, noise=0.03), row("lynx", 5000, fraction=0.5), row("grouped_mm", 12000)]
    rows += [row("vllm", 10000), row("nothing", 3000), row("grouped_mm", 9000, batch=1)]
    assert said_of(rows) == (
        "batch 1: no time; batch 16: 2000 tokens/s, 1.60x at half, 1.25x the best peer (vllm); "
        "logits off by at most 2.00%, PyTorch's two ways by 3.00%"
    )
    failed = {"contender": "lynx", "batch": 4, "fraction": 1.0, "failed": "RuntimeError: no"}
    assert said_of([failed]) == "batch 4: RuntimeError: no"
    assert said_of([]) == "not measured"


def test_its_plot(tmp_path: Path) -> None:
    rows = [row(name, 9000.0 + batch, batch) for name in ("lynx", "nothing", "vllm") for batch in (1, 16)]
    drawn = gpu_plots.plot({"environment": {}, "parts": {"model": {"result": {"rows": rows}}}}, tmp_path)
    assert [path.name for path in drawn] == ["model.png"]
    assert drawn[0].read_bytes()[:4] == b"\x89PNG"
