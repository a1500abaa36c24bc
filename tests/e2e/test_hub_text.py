"""Text of a Hub data set, read by the real `datasets` from a Hub on localhost."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.support.elsewhere import Elsewhere, compress


def test_a_checkpoint_is_measured_on_a_split_of_a_hub_data_set(
    hub_server: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        json.dumps({"body": f"line {i} of a held-out text, {i * 7} words on"}) for i in range(60)
    ]
    options = ["--text", "me/set", "--split", "held_out", "--windows", "2", "--length", "32"]
    fields = ["--text-field", "body", "--device", "cpu", "--json"]
    command = ["eval", str(tiny_model("llama")), *options, *fields]
    with hub_server.serving() as hub:
        head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: held_out\n"
        card = f"{head}    path: rows.jsonl\n---\n"
        files = {"rows.jsonl": "\n".join(rows).encode(), "README.md": card.encode()}
        hub.create("datasets/me/set", files)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        ours = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        with Elsewhere(**environment, **ours) as elsewhere:
            done = elsewhere(compress, *command)
            assert done["code"] == 0, done
            assert hub.count("GET", r"/resolve/[0-9a-f]{40}/rows\.jsonl$") > 0
            refused = elsewhere(compress, *command, "--split", "train")
    found = json.loads(done["out"])
    assert found["tokens"] == 62 and found["perplexity"]["error"] > 0
    assert refused["code"] == 2
    (error,) = json.loads(refused["out"])["errors"]
    assert "cannot read the data set me/set, split train" in error["message"]
