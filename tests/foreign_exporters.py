"""Files from real exporters, each in the environment that its package wants.

    python tests/foreign_exporters.py FOLDER

makes the two environments (some GB) and the files (`FOLDER/NAME/model.onnx`) from small random checkpoints;
`LYNX_EXPORTERS=FOLDER python -m pytest tests/test_foreign_exporters.py` then runs them too. Other versions of the
packages are tried by changing ENVIRONMENTS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENTS = {
    "genai": ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0"],
    "optimum": ["optimum-onnx==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6"],
}
COMMON = ["torch==2.13.0", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxscript==0.7.2"]
# name -> environment, architecture, the builder's options or Optimum's task, and the pattern that it is recognised as
FILES: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "genai-gpt-oss": ("genai", "gpt_oss", ("-p", "fp32", "-e", "cpu"), "com.microsoft.MoE"),
    "genai-lfm2-moe": ("genai", "lfm2_moe", ("-p", "fp32", "-e", "cpu"), "com.microsoft.MoE"),
    "genai-lfm2-moe-int4": ("genai", "lfm2_moe", ("-p", "int4", "-e", "cpu"), "com.microsoft.QMoE"),
    "optimum-qwen3-moe": ("optimum", "qwen3_moe", ("text-generation-with-past",), "per-expert loop"),
    "optimum-gpt-oss": ("optimum", "gpt_oss", ("text-generation-with-past",), "dense experts"),
}


def _config(architecture: str) -> Any:
    import transformers

    # No size is the vocabulary's but the vocabulary's: onnxruntime-genai tells the output embedding by that.
    common = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if architecture == "gpt_oss":
        sizes = {"head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, "sliding_window": 8}
        return transformers.GptOssConfig(**common, **sizes, num_experts_per_tok=2)
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    if architecture == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, **sizes, head_dim=16, norm_topk_prob=True)
    common["num_hidden_layers"] = 4
    layers = ["conv", "full_attention"] * 2
    return transformers.Lfm2MoeConfig(**common, **sizes, num_dense_layers=1, layer_types=layers)


def _checkpoint(architecture: str, folder: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    Tokenizer(models.BPE({chr(65 + at): at for at in range(60)}, [])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def make(name: str, folder: Path) -> None:
    """Write one file; runs inside its environment."""
    environment, architecture, options, _ = FILES[name]
    checkpoint = folder / "checkpoints" / name
    _checkpoint(architecture, checkpoint)
    if environment == "optimum":
        from optimum.exporters.onnx import main_export

        main_export(str(checkpoint), folder / name, task=options[0], do_validation=False, library_name="transformers")
        return
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint),
        "-o",
        str(folder / name),
    ]
    subprocess.run([*command, *options, "-c", str(folder / "cache")], check=True)


def prepare(folder: Path) -> None:
    """Both environments and all files; what is there already stays."""
    for environment, packages in ENVIRONMENTS.items():
        python = folder / environment / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / environment)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages, *COMMON], check=True)
        for name, (own, *_) in FILES.items():
            if own == environment and not (folder / name / "model.onnx").exists():
                offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
                subprocess.run([str(python), __file__, str(folder), name], check=True, env=offline)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    if len(sys.argv) > 2:
        make(sys.argv[2], target)
    else:
        prepare(target)
