"""What the command line shows, as SVG beside the results: `python -m bench.displays` writes plan.svg, claims.svg and
training.svg. The first two are calculated and always the same; the last is a short run of this machine."""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

from rich.console import Console

from nf4lora.cli import app, progress, report

from .files import RESULTS

LLAMA_3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=8192, rope_theta=500000.0,
)  # fmt: skip


def plan() -> Console:
    """Llama-3-8B on a card of 24 GiB."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLAMA_3_8B).save_pretrained(Path(folder) / "Llama-3-8B")
        return shown("plan", f"{folder}/Llama-3-8B", "--gpu", "24GiB")


def claims() -> Console:
    return shown("plan", "--claims")


def training() -> Console:
    """The demonstration's base on the prose of Python's help, byte by byte: the bar at its end, and the summary."""
    from pydoc_data.topics import topics
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from nf4lora.cli.methods import pretrain
    from nf4lora.cli.settings import DEMO

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pretrain(replace(DEMO, output=folder), lambda event: None)
        tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(place / "base")
        (place / "prose.txt").write_text("\n".join(topics[name] for name in sorted(topics)))
        options = ("--max-steps", "100", "--grad-accum", "1", "--seq-len", "128", "--lr", "4e-3")
        return shown("finetune", "--model", f"{folder}/base", "--data", f"{folder}/prose.txt", "--output", f"{folder}/out", *options)


def shown(*arguments: str) -> Console:
    """What a terminal shows of `nf4lora *arguments`, without the folders that it happened in."""
    console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True)
    printed = io.StringIO()

    class LastBar(progress.Bar):
        """Drawn once, as it ends: a recording has no cursor to go back with."""

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            console.print(self._progress.get_renderable())

    arguments = ("nf4lora", *arguments)
    places = {a: Path(a).name for a in arguments if a.startswith(tempfile.gettempdir())}
    console.print("[bold]$ " + " ".join(places.get(a, a) for a in arguments) + "[/]", highlight=False)
    with (
        mock.patch.object(sys, "argv", list(arguments)),
        mock.patch.object(report, "wide_console", lambda: console),
        mock.patch("nf4lora.cli.planning.show.wide_console", lambda: console),
        mock.patch("nf4lora.cli.user.Bar", LastBar),
        redirect_stdout(printed),
    ):
        try:
            code = app.run()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"nf4lora ended with {code}")
    text = printed.getvalue()
    for path, name in sorted(places.items(), reverse=True):
        text = text.replace(path, name)
    console.print(text.rstrip(), highlight=False)
    return console


DISPLAYS: dict[str, Callable[[], Console]] = {"plan": plan, "claims": claims, "training": training}


def svg(name: str) -> str:
    return DISPLAYS[name]().export_svg(title="nf4lora", unique_id=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(DISPLAYS), metavar="NAME", help=", ".join(DISPLAYS))
    for name in parser.parse_args().names:
        (RESULTS / f"{name}.svg").write_text(svg(name))


if __name__ == "__main__":
    main()
