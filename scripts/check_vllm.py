"""Write checkpoints in every form that vLLM is said to load, and hold vLLM's losses against ours.

    python scripts/check_vllm.py OUT MODEL [MODEL ...] --vllm SITE_PACKAGES [--forms NAME ...]
        [--parallel 6] [--vllm-option attention_backend=TRITON_ATTN]

For each MODEL and each form of check_vllm.yaml that its shapes allow, `compress run` writes and
evaluates a file of OUT; vLLM, from the folder of packages SITE_PACKAGES and in a process of its
own, loads it and computes the loss of the same windows of tokens. Without --vllm only our side
runs. Exit code 1: a file did not load, or losses differ by more than rounding does.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tables import markdown

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from whole import run

LENGTH, WINDOWS = 512, 8
TOLERANCE = 0.03
"""Nats a token by which two correct programs in bfloat16 differ at most."""

TIMEOUT = 280


@dataclass(frozen=True)
class Form:
    """Passes and format of a recipe; `multiple` of every width, tied heads untied, dense models."""

    passes: list[Any]
    format: str = "compressed-tensors"
    multiple: int = 32
    untie: bool = False
    dense_only: bool = False


LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
FORMS: dict[str, Form] = {name: Form(**form) for name, form in LISTED.items()}

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors show as they are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
}


def fits(form: Form, config: dict[str, Any]) -> bool:
    """Whether a form is for the shapes of a model, as far as config.json says them."""
    keys = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    even = all((config.get(key) or 0) % form.multiple == 0 for key in keys)
    return even and not (form.dense_only and {"num_local_experts", "num_experts"} & config.keys())


def last_error(log: str) -> str:
    """The last exception that a log shows."""
    found = re.findall(r"^.*?\b([A-Za-z_.]*(?:Error|Exception)\b.*)$", log, re.M)
    lines = found or log.strip().splitlines() or ["no output"]
    return str(lines[-1])[:300]


def ours(model: Path, folder: Path, form: Form) -> dict[str, Any]:
    """Write and evaluate a checkpoint: loss of the written file and of its source."""
    recipe = {
        "model": str(model.resolve()),
        "calibration": {"data": "bundled", "samples": 64, "length": 512},
        "passes": form.passes,
        "format": form.format,
        "untie": form.untie,
        "dtype": "bfloat16",
        "evaluate": {"data": "bundled", "windows": WINDOWS, "length": LENGTH},
    }
    try:
        found = run(recipe, folder, device="auto").result["evaluate"]
    except SystemExit as error:
        return {"error": str(error).splitlines()[0]}
    perplexities = {"ours": found["perplexity"], "source": found["original_perplexity"]}
    return {name: math.log(each["value"]) for name, each in perplexities.items()}


def theirs(folder: Path, tokens: Path, args: Namespace) -> dict[str, Any]:
    """vLLM's loss on a checkpoint, from a process of its own; what that said stays."""
    log = folder.with_name(f"{folder.name}.log")
    command = [sys.executable, __file__, "--child", f"{folder}/out", str(tokens)]
    command += [part for option in args.vllm_option for part in ("--vllm-option", option)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": args.vllm}
    with log.open("w") as handle:
        try:
            subprocess.run(
                command, stdout=handle, stderr=subprocess.STDOUT, env=environment, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer in {TIMEOUT} s"}
    said = log.read_text(errors="replace")
    if not (found := re.search(r'^\{"vllm": .*\}$', said, re.M)):
        return {"error": last_error(said)}
    kernels = re.findall(r"(?:Using|Selected) '?(\w*(?:Kernel|Experts)\w*)'?", said)
    return {**json.loads(found[0]), "kernels": sorted(set(kernels))}


def child(checkpoint: str, tokens: str, options: list[str]) -> None:
    """In vLLM's environment: the mean loss of the windows."""
    from vllm import LLM, SamplingParams, __version__

    model = LLM(
        model=checkpoint,
        enforce_eager=True,
        max_model_len=2 * LENGTH,
        seed=0,
        gpu_memory_utilization=0.02,  # of what must be free at all
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        max_num_seqs=16,
        disable_log_stats=True,
        **dict(option.split("=", 1) for option in options),
    )
    windows = json.loads(Path(tokens).read_text())
    once = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    answers = model.generate([{"prompt_token_ids": w} for w in windows], once, use_tqdm=False)
    losses = [
        -entry[token].logprob
        for window, answer in zip(windows, answers, strict=True)
        for token, entry in zip(window[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    method = model.llm_engine.vllm_config.model_config.quantization
    found = {"vllm": sum(losses) / len(losses), "method": method, "version": __version__}
    print(f"\n{json.dumps(found)}", flush=True)


HEAD = ("model", "form", "vLLM's method, kernels", "vLLM", "ours", "difference", "source")


def cells(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A table's."""
    for row in rows:
        numbers = [f"{row[key]:.3f}" if key in row else "-" for key in ("vllm", "ours", "source")]
        apart = f"{row['vllm'] - row['ours']:+.4f}" if {"vllm", "ours"} <= row.keys() else "-"
        how = row.get("error") or ", ".join([str(row.get("method")), *row.get("kernels", ())])
        yield [row["model"], row["form"], how, *numbers[:2], apart, numbers[2]]


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--vllm", help="folder of packages with vLLM")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--vllm-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--child", nargs=2, help=SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.vllm_option)
        return 0
    from compressor.evaluate.settings import Evaluation
    from compressor.run.tokens import evaluation_tokens
    from compressor.runner.tokenizer import load_tokenizer

    args.output.mkdir(parents=True, exist_ok=True)
    wanted = Evaluation(data="bundled", windows=WINDOWS, length=LENGTH)
    for model in args.models:
        rows = evaluation_tokens(load_tokenizer(model), wanted, calibration=None).ids.tolist()
        (args.output / f"{model.name}.tokens.json").write_text(json.dumps(rows))

    def judge(model: Path, name: str) -> dict[str, Any]:
        folder = args.output / f"{model.name}-{name}"
        folder.mkdir(exist_ok=True)
        written = ours(model, folder, FORMS[name])
        row: dict[str, Any] = {"model": model.name, "form": name, **written}
        if "error" not in row and args.vllm:
            row |= theirs(folder, args.output / f"{model.name}.tokens.json", args)
        shutil.rmtree(folder)
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(args.parallel) as pool:
        asked = [
            pool.submit(judge, model, name)
            for model in args.models
            for config in [json.loads((model / "config.json").read_text())]
            for name in args.forms
            if fits(FORMS[name], config)
        ]
        rows = [future.result() for future in asked]
    print(markdown(HEAD, cells(rows)))
    bad = [row for row in rows if "error" in row]
    apart = [row for row in rows if "vllm" in row and abs(row["vllm"] - row["ours"]) > TOLERANCE]
    print(f"{len(rows)} files: {len(bad)} failed, {len(apart)} with another loss")
    return 1 if bad or apart else 0


if __name__ == "__main__":
    sys.exit(main())
