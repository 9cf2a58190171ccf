"""The command line on bad input, its help, `doctor` and `errors`: one clear line, exit code 2, no traceback."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import in_process, refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nf4lora.cli.errors as error_table
from nf4lora.cli import app
from nf4lora.cli.metrics import Metrics
from nf4lora.cli.settings import Settings


@pytest.fixture
def nf4lora(capsys, monkeypatch, tmp_path):
    return in_process(capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with a tokenizer of single letters."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{chr(97 + i): i + 1 for i in range(26)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=27, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


NUMBERS = [
    ("--r", "0", "1 or more"), ("--r", "-3", "1 or more"), ("--alpha", "0", "above 0"), ("--alpha", "inf", "above 0"),
    ("--dropout", "1", "[0, 1)"), ("--dropout", "-0.1", "[0, 1)"), ("--dropout", "nan", "[0, 1)"), ("--lr", "0", "above 0"),
    ("--lr", "nan", "above 0"), ("--lr", "-0.5", "above 0"), ("--warmup-ratio", "1.5", "[0, 1]"),
    ("--max-grad-norm", "0", "above 0"), ("--epochs", "0", "above 0"), ("--max-steps", "0", "1 or more"),
    ("--batch-size", "0", "1 or more"), ("--grad-accum", "0", "1 or more"), ("--seq-len", "1", "2 or more"),
    ("--save-steps", "0", "1 or more"), ("--seed", "-1", "0 to 2**63"), ("--lr-scheduler", "cosin", "constant, linear, cosine"),
    ("--compute-dtype", "int8", "auto, float32, bfloat16"), ("--target-modules", "a,,b", "separated by commas"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "wanted"), NUMBERS)
def test_a_bad_option(nf4lora, option, value, wanted):
    refused(nf4lora("finetune", option, value), f"{option}: found {value}", wanted)
    refused(nf4lora("finetune", "--model", "m", "--data", "d.txt", option, value), f"{option}: found {value}", wanted)
    assert list(Path().iterdir()) == []


def test_a_value_of_the_wrong_kind(nf4lora):
    code, out, err = nf4lora("finetune", "--r", "eight")
    assert code == 2 and out == "" and "'--r' / '--rank': Input should be a valid integer" in err and "Traceback" not in err


def test_model_and_data_go_together(nf4lora, folder):
    refused(nf4lora("finetune", "--model", folder), "--model and --data go together")
    refused(nf4lora("finetune", "--data", "d.txt"), "--model and --data go together")
    refused(nf4lora("finetune", "--resume"), "--resume")


DATA = {
    "empty.txt": (b"", "is empty (0 bytes"),
    "blank.txt": (b" \n\n\t", "is empty (4 bytes, no text)"),
    "latin1.txt": ("déjà".encode("latin1"), "is not UTF-8: byte 0xe9 at offset 1"),
    "late.jsonl": (b'{"text": "a"}\n' + b"\xff\n", "is not UTF-8: byte 0xff at offset 14"),
    "short.txt": (b"a", "found 1 tokens, wanted 2 or more"),
    "empty.jsonl": (b"\n\n", "is empty"),
    "notext.jsonl": (b'{"text": ""}\n{"text": " "}\n', "is empty: 2 lines without text"),
    "torn.jsonl": (b'{"text": "ab"}\n\n{"text": "ab', "torn.jsonl line 3 is not JSON"),
    "list.jsonl": (b'{"text": "ab"}\n[1]\n', "line 2 is a JSON list; wanted an object"),
    "key.jsonl": (b'{"txt": "ab", "id": 1}\n', "line 1 has the keys ['id', 'txt']; wanted \"text\""),
    "number.jsonl": (b'{"text": 3}\n', "line 1 has the keys ['text']"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "ab"}]}\n', "line 1 has \"messages\", but the tokenizer has no chat template"),
    "table.csv": (b"a,b\n", "wanted a .txt or .jsonl file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_bad_data(nf4lora, folder, name):
    content, message = DATA[name]
    Path(name).write_bytes(content)
    refused(nf4lora("finetune", "--model", folder, "--data", name, "--seq-len", 4), "--data", message)


def test_data_that_is_no_regular_file(nf4lora, folder):
    refused(
        nf4lora("finetune", "--model", folder, "--data", "none.txt"), "--data: none.txt cannot be read (No such file"
    )
    os.mkfifo("pipe.jsonl")
    Path("zero.txt").symlink_to("/dev/zero")
    code = "from nf4lora.cli.rows import read_rows\nfor name in ('pipe.jsonl', 'zero.txt'):\n    try: read_rows(name)\n    except Exception as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [line.partition(" (")[2][:17] for line in done.stdout.splitlines()] == ["no regular file);"] * 2
    Path("run.yaml").write_text(f'model: {folder}\ndata: "a\\0.txt"\n')
    refused(nf4lora("finetune", "--config", "run.yaml"), "--data: a", "cannot be read (embedded null byte)")
    Path("folder.txt").mkdir()
    refused(
        nf4lora("finetune", "--model", folder, "--data", "folder.txt"),
        "--data: folder.txt cannot be read (Is a directory",
    )


def test_unknown_target_modules_are_named_with_those_there(nf4lora, folder):
    Path("d.txt").write_text("abcabc")
    result = nf4lora(
        "finetune", "--model", folder, "--data", "d.txt", "--seq-len", "4", "--target-modules", "q_proj,query"
    )
    refused(result, "--target-modules", "query", "q_proj", "down_proj")


@pytest.mark.parametrize("model", [[], ["--model", "m", "--data", "d.txt"]])
@pytest.mark.parametrize("output", ["file/below", "/proc/nf4lora"])
def test_an_output_folder_that_cannot_be_written(nf4lora, model, output):
    Path("file").write_text("")
    refused(nf4lora("finetune", *model, "--output", output), f"--output: {output} cannot be written", "wanted a folder")


def test_a_model_that_is_missing_or_no_model(nf4lora, folder, tmp_path):
    Path("d.txt").write_text("abcabc")
    refused(nf4lora("finetune", "--model", "./none", "--data", "d.txt"), "--model: no such folder: ./none")
    Path("empty").mkdir()
    refused(nf4lora("finetune", "--model", "./empty", "--data", "d.txt"), "--model: ./empty cannot be loaded")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    refused(nf4lora("finetune", "--model", broken, "--data", "d.txt", "--seq-len", "4"), "cannot be loaded", "broken")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(nf4lora("finetune", "--model", broken, "--data", "d.txt", "--seq-len", "4"), "cannot be loaded")


def test_a_sequence_longer_than_the_model_takes(nf4lora, folder):
    Path("d.txt").write_text("abc" * 100)
    refused(
        nf4lora("finetune", "--model", folder, "--data", "d.txt", "--seq-len", "65"),
        "--seq-len: found 65, wanted at most 64",
    )


def test_resume_without_a_checkpoint(nf4lora, folder):
    Path("d.txt").write_text("abcabc")
    refused(
        nf4lora("finetune", "--model", folder, "--data", "d.txt", "--resume"),
        "--resume: no complete checkpoint in nf4lora-output",
    )


def test_help_needs_neither_transformers_nor_matplotlib():
    heavy = "{'transformers', 'peft', 'matplotlib', 'accelerate'}"
    code = f"import sys; import nf4lora.cli.app; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_extras_are_named(monkeypatch):
    from nf4lora import cli

    monkeypatch.setattr(cli, "NEEDS", (*cli.NEEDS, "nf4lora_no_such_package"))
    with pytest.raises(SystemExit, match=r"needs nf4lora_no_such_package: pip install 'nf4lora\[cli\]'"):
        cli.main()


@pytest.mark.parametrize("where", ["nf4lora.cli.app", "nf4lora.cli.user"])
def test_ctrl_c_during_an_import(tmp_path, where):
    code = (
        "import sys\nfrom importlib.abc import MetaPathFinder\nfrom nf4lora.cli import main\n"
        "class Finder(MetaPathFinder):\n    def find_spec(self, name, path, target=None):\n"
        f"        if name == {where!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\nsys.argv = ['nf4lora', 'finetune', '--model', 'm', '--data', 'd.txt']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "nf4lora: stopped: Ctrl-C\n")


def test_metrics_of_a_resumed_run_go_on_from_those_that_are_its_own(tmp_path):
    metrics = Metrics(tmp_path, 0)
    records = [{"step": step, "loss": 1 / step, "seconds": 2.0 * step, "budget": None} for step in (1, 2, 3)]
    for record in records:
        metrics.add(record)
    foreign = [{"step": 1, "foo": 2}, {"step": 1, "loss": 2}, {"loss": 2, "seconds": 1}, [1], 3, None, {"step": "1", "seconds": 1},
               {"step": None, "seconds": 1}, {"step": 1, "seconds": None}, {"step": 1, "seconds": 1, "loss": [2]}]  # fmt: skip
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in foreign)
    resumed = Metrics(tmp_path, 2)
    for step in (3, 4):
        resumed.add({"step": step, "seconds": 1.5 * (step - 2)})
    wanted = [*records[:2], {"step": 3, "seconds": 5.5}, {"step": 4, "seconds": 7.0}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == wanted
    with (tmp_path / "metrics.csv").open() as file:
        rows = [(float(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    assert rows == [(line["step"], line["seconds"]) for line in wanted]


def test_help_names_every_option(nf4lora):
    code, out, _ = nf4lora("finetune", "--help")
    options = [*(name.replace("_", "-") for name in Settings.__dataclass_fields__), "config", "json"]
    assert code == 0
    for option in options:
        assert re.search(rf"--{option}[ ,]", out), option


def test_every_command_shows_an_example_and_prints_json(nf4lora):
    commands = [command.callback.__name__ for command in app.app.registered_commands]
    assert len(commands) == 9
    for name in commands:
        code, out, _ = nf4lora(name, "--help")
        assert code == 0 and f"Example: nf4lora {name} " in " ".join(out.split()) and "--json" in out, name


def test_doctor_says_what_is_there_and_why_not(nf4lora):
    code, out, err = nf4lora("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] == torch.__version__
    states = {(row["device"], row["backend"]): row["why_not"] for row in found["backends"]}
    assert states["cpu", "reference"] is None
    assert {device for device, _ in states} == {"cpu", "cuda"}
    assert all(reason for (device, _), reason in states.items() if device == "cuda") or torch.cuda.is_available()
    code, out, err = nf4lora("doctor")
    assert code == 0 and "ready" in out and torch.__version__ in out


def test_errors_table(nf4lora):
    code, out, _ = nf4lora("errors", "--json", "--size", "65536")
    table = {(row["weights"].split()[0], row["format"]): row for row in json.loads(out)}
    assert code == 0 and len(table) == 8
    for weights in ("normal", "heavy-tailed"):
        rms = {form: table[weights, form]["relative_rms"] for form in error_table.FORMATS}
        assert 0.05 < rms["NF4"] < min(rms["FP4"], rms["INT4"])
        assert rms["NF4 + double quant."] == pytest.approx(rms["NF4"], rel=0.02)
    assert table["normal", "NF4"]["relative_rms"] == pytest.approx(0.092, abs=0.002)
    code, out, _ = nf4lora("errors", "--size", "65536")
    assert code == 0 and "INT4" in out and "heavy-tailed" in out


def test_int4_of_the_error_table_is_symmetric_absmax():
    weight = torch.tensor([-7.0, 7, 3.4, -3.6, 0, 0.4] + [0.0] * 58 + [14.0, 3])
    expected = torch.tensor([-7.0, 7, 3, -4, 0, 0] + [0.0] * 58 + [14.0, 4])  # 3 / 2 rounds to the even 2
    assert error_table._roundtrip(weight, "INT4").equal(expected)


def test_errors_of_a_demo_that_is_not_there(nf4lora):
    refused(nf4lora("errors", "--demo", "none"), "--demo: no none/base/model.safetensors")
    refused(nf4lora("errors", "--size", "0"), "--size: found 0")
