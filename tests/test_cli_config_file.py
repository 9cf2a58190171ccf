"""`nf4lora finetune --config FILE.yaml`: every option by its name, the command line above it, and what is refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import in_process, refused

from nf4lora.cli import config_file, user
from nf4lora.cli.settings import Settings

EVERY = {
    "model": "m", "data": "d.jsonl", "output": "out", "method": "adalora", "r": 12, "alpha": 24, "dropout": 0.1, "target_r": 8,
    "tinit": 5, "tfinal": 20, "delta_t": 3, "target_modules": ["q_proj", "v_proj"], "lr": 1e-3, "optim": "adamw_torch",
    "lr_scheduler": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 0.3, "epochs": 2, "max_steps": 7, "batch_size": 2,
    "grad_accum": 3, "seq_len": 64, "loss_on": "all", "packing": True, "gradient_checkpointing": True, "save_steps": 4,
    "resume": True, "seed": 5, "compute_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def finetune(capsys, monkeypatch, tmp_path):
    """finetune(*arguments) -> (exit code, stdout, stderr), and the settings that the run would have had."""
    command = in_process(capsys, monkeypatch, tmp_path, "finetune")
    monkeypatch.setattr(user, "run", lambda settings, as_json: taken.append(settings))
    taken: list[Settings] = []

    def run(*arguments):
        taken.clear()
        return command(*arguments), taken[-1] if taken else None

    return run


def written(options) -> Path:
    path = Path("run.yaml")
    path.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    return path


def test_every_option_can_be_set_in_the_file(finetune):
    assert EVERY.keys() == set(Settings.__dataclass_fields__)
    unlike = Settings(model="m", data="d.jsonl")
    (code, *_), settings = finetune("--config", written(EVERY))
    assert code == 0
    for name, value in EVERY.items():
        assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value)
        assert name in ("model", "data") or getattr(settings, name) != getattr(unlike, name)


def test_every_option_of_the_command_line_counts_before_the_file(finetune):
    given = dict(
        model="n", data="e.txt", output="other", method="adalora", r=16, alpha=8.0, dropout=0.2, target_r=4, tinit=6, tfinal=21,
        delta_t=2, target_modules=("down_proj",), lr=2e-3, optim="adamw_8bit", lr_scheduler="linear", warmup_ratio=0.2,
        max_grad_norm=0.4, epochs=3.0, max_steps=8, batch_size=3, grad_accum=4, seq_len=32, loss_on="answers", packing=False,
        gradient_checkpointing=False, save_steps=5, resume=False, seed=6, compute_dtype="bfloat16",
    )  # fmt: skip
    assert given.keys() == EVERY.keys()
    flags = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            flags += [f"--{option}", ",".join(value) if isinstance(value, tuple) else value]
    (code, _, err), settings = finetune("--config", written(EVERY), *flags)
    assert code == 0, err
    assert {name: getattr(settings, name) for name in given} == given


def test_names_with_hyphens_and_numbers_as_people_write_them(finetune):
    file = written("model: m\ndata: d.txt\nseq-len: 32\nlr: 2e-4\nalpha: 16\ntarget-modules: q_proj,v_proj\ndropout:\n")
    (code, *_), settings = finetune("--config", file)
    assert code == 0 and settings == Settings(
        model="m", data="d.txt", seq_len=32, lr=2e-4, alpha=16.0, target_modules=("q_proj", "v_proj")
    )


def test_what_a_run_wrote_is_read_again(tmp_path):
    settings = Settings(model="m", data="d.txt", target_modules=("q_proj", "o_proj"), lr=3e-5, resume=True)
    config_file.write(settings, tmp_path / "config.yaml")
    assert Settings(**config_file.read(tmp_path / "config.yaml")) == Settings(**{**vars(settings), "resume": False})


@pytest.mark.parametrize("names", ["q_proj, v_proj ", ["q_proj", " v_proj"]])
def test_spaces_around_names_of_modules(finetune, names):
    (code, *_), settings = finetune("--config", written({"model": "m", "data": "d.txt", "target_modules": names}))
    assert code == 0 and settings.target_modules == ("q_proj", "v_proj")
    (code, *_), settings = finetune("--model", "m", "--data", "d.txt", "--target-modules", " q_proj, v_proj")
    assert code == 0 and settings.target_modules == ("q_proj", "v_proj")


def nested(form: str, again: str, text: str) -> str:
    """Ten levels, each with the one below it ten times over: ten billion of them in half a kilobyte."""
    for level in range(1, 10):
        text = form.format(f"&a{level}", text + again.format(f"*a{level - 1}") * 9)
    return f"r: {text}"


WRONG = {
    nested("{} [{}]", ", {}", "&a0 [x]"): ("r: found [[[", "wanted an integer"),
    nested("{} {{<<: [{}]}}", ", {}", "&a0 {k: 1}"): ("is not YAML", "merge"),
    "epochs: 1" + "0" * 400: ("epochs: found 1000", "wanted a number"),
    "seed: 0x1" + "0" * 5000: ("seed: found an integer too long to write", "wanted an integer"),
    "target_modules: [0x1" + "0" * 5000 + "]": ("wanted a name or a list of names",),
    "? lerning_rate" + "e" * 10_000 + "\n: 1": ("the key lerning_rate", "does not exist"),
    "lerning_rate: 1": ("the key lerning_rate, which does not exist", "did you mean lr?"),
    "learning_rate: 1e-4": ("the key learning_rate", "did you mean lr?"),
    "batchsize: 1": ("the key batchsize", "did you mean batch_size?"),
    "gradient_checkpoint: true": ("did you mean gradient_checkpointing?",),
    "xyzzy: 1": ("the key xyzzy, which does not exist; there are model, data,",),
    "json: true": ("the key json, which does not exist",),
    "r: 8.5": ("r: found 8.5, wanted an integer",),
    "r: true": ("r: found True, wanted an integer",),
    "r: eight": ("r: found 'eight', wanted an integer",),
    "lr: fast": ("lr: found 'fast', wanted a number",),
    "lr: true": ("lr: found True, wanted a number",),
    "packing: 1": ("packing: found 1, wanted true or false",),
    "packing: 'no'": ("packing: found 'no', wanted true or false",),
    "output: 3": ("output: found 3, wanted text",),
    "target_modules: [q_proj, 3]": ("target_modules: found ['q_proj', 3], wanted a name or a list of names",),
    "target_modules: {q: 1}": ("wanted a name or a list of names",),
    "r: 0": ("--r: found 0, wanted an integer of 1 or more",),
    "method: dora": ("--method: found dora, wanted one of lora, qlora, adalora",),
    "target_r: 4": ("--target-r: found 4, wanted --method adalora with it",),
    "r: 8\nr: 9": ("found the key r twice",),
    "seq_len: 8\nseq-len: 9": ("the key seq-len twice",),
    "- r": ("holds a list, wanted `option: value` lines",),
    "": ("holds a NoneType",),
    "r: [": ("is not YAML",),
    "a: !!python/object/apply:os.system [true]": ("is not YAML",),
    "? {a: 1}\n: 2": ("is not YAML",),
    "[" * 3000: ("is not YAML",),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30].replace("\n", " "))
def test_a_file_that_is_refused(finetune, text):
    result, settings = finetune("--config", written(text), "--model", "m", "--data", "d.txt")
    refused(result, *WRONG[text])
    assert len(result[2]) < 600
    assert settings is None


def test_a_file_that_is_not_there_or_too_large(finetune):
    refused(finetune("--config", "none.yaml")[0], "--config: none.yaml cannot be read (No such file")
    refused(finetune("--config", written("# " + "x" * (1 << 20)))[0], "wanted at most 1048576")


def test_what_may_never_end(finetune):
    os.mkfifo("pipe")
    for path in ("/dev/zero", "pipe"):
        command = [sys.executable, "-m", "nf4lora.cli", "finetune", "--config", path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        refused((done.returncode, done.stdout, done.stderr), f"--config: {path} cannot be read (no regular file); wanted a YAML file")


def test_many_keys_are_read_in_linear_time(finetune):
    pairs = [(yaml.ScalarNode("tag:yaml.org,2002:str", str(i)), yaml.ScalarNode("tag:yaml.org,2002:str", "")) for i in range(40_000)]
    loader = config_file._Loader("")
    before = time.process_time()
    assert len(loader.construct_mapping(yaml.MappingNode("tag:yaml.org,2002:map", pairs))) == 40_000
    assert time.process_time() - before < 5  # each looked for among all: 20 s and more


def test_what_the_demonstration_cannot_have(finetune):
    for options in (["--method", "lora"], ["--packing"], ["--epochs", 2], ["--loss-on", "all"], ["--config", written({"packing": True})]):
        result, _ = finetune(*options)
        refused(result, f"{options[0] if options[0] != '--config' else '--packing'}: for your own --model and --data")
