"""The command line in this process, and what a refusal looks like."""

import sys

from nf4lora.cli import app


def in_process(capsys, monkeypatch, tmp_path, *first):
    """command(*arguments) -> (exit code, stdout, stderr) of `nf4lora *first *arguments`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["nf4lora", *first, *map(str, arguments)])
        try:
            code = app.run()
        except SystemExit as end:
            code = end.code
        return code or 0, *capsys.readouterr()

    return command


def refused(result, *texts):
    code, out, err = result
    assert code == 2 and out == "", result
    assert err.startswith("nf4lora: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for text in texts:
        assert text in err, err
