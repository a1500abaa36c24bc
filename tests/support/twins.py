"""Checkpoints of the golden twins: the same model with and without a planted backdoor."""

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.golden_files import vectors_and_notes

TRIGGERS = [101, 104, 107, 110, 113, 116]
KINDS = ("bert", "llama")


def write_twin(kind: str, which: str, folder: Path) -> Path:
    """One twin as a folder, with its alphabet as a tokenizer."""
    tensors, notes = vectors_and_notes(f"systems/neuba_{kind}_{which}")
    folder.mkdir(parents=True)
    config = json.loads(notes["config"])
    config["architectures"] = ["BertForMaskedLM" if kind == "bert" else "LlamaForCausalLM"]
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    alphabet(json.loads(notes["vocabulary"]), encoder=kind == "bert").save_pretrained(folder)
    return folder


def alphabet(said: dict, *, encoder: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    first, chars = said.pop("first_char_id"), said.pop("chars")
    vocabulary = {**said, **{char: first + i for i, char in enumerate(chars)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="UNK"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    pair = [("CLS", said["CLS"]), ("SEP", said["SEP"])]
    template = "CLS $A SEP" if encoder else "CLS $A"
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=pair)
    more = {"mask_token": "MASK"} if "MASK" in said else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="UNK", bos_token="CLS", **more)
