"""The command line: help, one-line errors, Ctrl-C, and the commands beside finetune and replay."""

from __future__ import annotations

import builtins
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from adamezo import cli, finetune
from adamezo.command import doctor
from adamezo.finetune import needs
from adamezo.runlog import read
from adamezo_kernels.backends import native
from helpers.backends import needs_native
from helpers.command import arguments

COMMANDS = ("finetune", "replay", "memory", "doctor", "bench")
RUN = "import sys; from adamezo.cli import main; sys.exit(main())"


# -- help and errors -------------------------------------------------------------------------------


def test_help_lists_the_commands_and_the_options(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    for command in COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["finetune"], "Missing option '--model'"),
        (
            ["finetune", "--model", "m", "--data", "d", "--lr", "fast"],
            "Invalid value for '--lr'",
        ),
        (["finetune", "--model", "m", "--data", "d", "--task", "x"], "'x' is not one of 'classif"),
        (["finetune", "--model", "m", "--data", "d", "a=b"], "got 'a=b' without an option"),
        (["finetune", "--model", "m", "--data", "d", "--distribution", "x"], "must be one of"),
        (["finetune", "--model", "m", "--nosuch", "1"], "No such option"),
        (["nosuch"], "No such command 'nosuch'"),
        (["replay", "base", "log"], "Missing option '--out'"),
    ],
)
def test_a_mistake_of_usage_is_one_line_and_code_2(capsys, given, message):
    with pytest.raises(SystemExit) as raised:
        cli.main(given)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("--help)")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "someone/a-model"}, "hf download someone/a-model --local-dir FOLDER"),
        ({"data": "none.csv"}, "--data: got 'none.csv', expected a file on this machine"),
        ({"text_column": "review"}, "expected one named 'review', or name the column with --text-"),
        ({"method": "MeZO", "horizon": 3}, "--horizon: MeZO has no such option"),
        ({"method_option": "queries"}, "--method-option: got 'queries', expected NAME=VALUE"),
        ({"method_option": "queries=1", "label_words": "negative=bad"}, "got 'negative' twice"),
        ({"steps": 0}, "--steps: got 0, expected an integer of at least 1"),
    ],
)
def test_bad_input_is_one_line_and_code_1(
    model_folder, data_file, tmp_path, capsys, changed, message
):
    assert cli.main(arguments(model_folder, data_file, tmp_path / "out", **changed)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adamezo:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def without_typer(name, *rest, **named):
        if name.split(".")[0] == "typer":
            raise ImportError("No module named 'typer'", name="typer")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_typer)
    assert cli.main(["doctor"]) == 1
    assert (
        "needs typer, which is not installed: pip install 'adamezo[cli]'" in capsys.readouterr().err
    )


def test_without_transformers_the_other_commands_run():
    code = (
        "import sys; sys.modules['transformers'] = None; from adamezo.cli import main; "
        "assert main(['doctor', '--seconds', '0']) == 0; sys.exit(main(['finetune']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the transformers package: pip install 'adamezo[transformers]'" in done.stderr


# -- a run -----------------------------------------------------------------------------------------


def test_the_same_command_goes_on_and_another_needs_overwrite(
    model_folder, data_file, tmp_path, capsys
):
    output = tmp_path / "out"
    assert cli.main(arguments(model_folder, data_file, output, steps=2)) == 0
    assert cli.main(arguments(model_folder, data_file, output, steps=5)) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["training"]["replayed"] == 2
    capsys.readouterr()
    other = arguments(model_folder, data_file, output, seed=1)
    assert cli.main(other) == 1
    assert "name another --output, or begin anew with --overwrite" in capsys.readouterr().err
    assert cli.main([*other, "--overwrite"]) == 0
    assert json.loads((output / "report.json").read_text())["training"]["replayed"] == 0


def test_a_zo_eps_that_16_bits_lose_is_told_of(model_folder, data_file, tmp_path, capsys):
    def said(**more):
        output = tmp_path / "-".join(more.values())
        of = dict(steps=1, lr=1e-6, perturbation="out_of_place", **more)
        assert cli.main(arguments(model_folder, data_file, output, **of)) == 0
        told = re.search(r"give --zo-eps (\S+), and (\d+) times the lr", capsys.readouterr().err)
        return told and told.groups()

    assert said(method="FZOO", dtype="bfloat16") == ("0.01", "100")
    assert said(method="FZOO", dtype="bfloat16", zo_eps="1e-3") == ("0.01", "10")
    assert said(method="FZOO", dtype="bfloat16", adapt="lora") == ("0.001", "10")
    assert not said(method="FZOO", dtype="bfloat16", zo_eps="1e-2")
    assert not said(method="FZOO", dtype="bfloat16", zo_eps="1e-3", adapt="lora")
    assert not said(method="FZOO", dtype="float32")
    assert not said(method="MeZO", dtype="bfloat16")


def test_progress_has_what_a_user_watches(model_folder, data_file, tmp_path, capsys):
    assert cli.main(arguments(model_folder, data_file, tmp_path / "out", eval_every=2)) == 0
    shown = capsys.readouterr().err
    for part in ("held-out, before", "4/4", "loss=", "projected gradient=", "forwards/s",
                 "optimizer ", "left 0:00", "step 2: held-out loss"):  # fmt: skip
        assert part in shown


def test_ctrl_c_saves_and_says_how_to_go_on(model_folder, data_file, tmp_path):
    """In a process of its own, as a terminal would send it."""
    output = tmp_path / "out"
    given = arguments(model_folder, data_file, output, steps=100000, checkpoint_every=10)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *given], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    log = output / "run.log"
    end = time.monotonic() + 120
    while not (output / "run.log.checkpoint").exists() and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 130, said
    steps = read(log).steps
    assert f"stopped after {steps} of 100000 steps. They are saved in {log}" in said
    command = said.splitlines()[-1]
    assert command.strip().startswith("adamezo finetune --model")
    # It goes on where it was.
    result = finetune.finetune(
        finetune.Options(
            str(model_folder),
            str(data_file),
            label_words={"negative": "terrible", "positive": "great"},
            held_out=10,
            batch_size=4,
            lr=1e-3,
            device="cpu",
            steps=steps + 2,
            log=str(log),
        )  # fmt: skip
    )
    assert [point["step"] for point in result["curve"]] == [steps + 1, steps + 2]


# -- the other commands ----------------------------------------------------------------------------


@needs_native
def test_the_doctors_test_compares_bits_and_sees_a_wrong_one(monkeypatch, capsys):
    counts, wrong = doctor.self_test(0.3, seed=1)
    assert set(counts) == {f"native {name}" for name in native.instruction_sets()}
    assert not wrong
    real = doctor._result

    def off_by_a_bit(case, backend, device):
        tensors = real(case, backend, device)
        if backend is native:
            bits = tensors[0].view(doctor._BITS[tensors[0].dtype])
            bits[-1] ^= 1
        return tensors

    monkeypatch.setattr(doctor, "_result", off_by_a_bit)
    assert cli.main(["doctor", "--seconds", "0.1"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT BITS: native" in shown
    assert "transformers" in shown


def test_the_doctor_says_what_would_be_faster(monkeypatch, capsys):
    monkeypatch.setenv("ADAMEZO_BACKEND", "reference")
    monkeypatch.setattr(doctor, "self_test", lambda seconds: (Counter(), []))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "ADAMEZO_BACKEND holds everything to the reference" in shown
    assert "nothing to compare" in shown


def test_the_bench_times_both_ways(capsys):
    assert cli.main(["bench", "--elements", "20000", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "perturb, float32" in shown
    assert "20,000 weights on cpu" in shown


@pytest.fixture
def config(tmp_path):
    """Of a model whose parts are large enough to be seen in the memory of a process."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=20000, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "config")  # fmt: skip
    return tmp_path / "config"


def test_memory_of_a_step_from_a_config(config, capsys):
    assert (
        cli.main(["memory", str(config), "--method", "ZOAdam", "--perturbation", "out_of_place"])
        == 0
    )
    shown = capsys.readouterr().out
    embedding, layer = 20000 * 256, 256 * (256 * 2 + 128 * 2 + 3 * 1024 + 2)
    count = embedding + 2 * layer + 256
    assert f"{count:,} weights, float32" in shown
    found = needs.needs(config, needs.Setup(method="ZOAdam", perturbation="out_of_place"))
    assert (found.weights, found.buffers, found.copies) == (4 * count, 8 * count, 4 * embedding)
    half = needs.needs(config, needs.Setup(dtype="bfloat16"))
    assert half.weights == 2 * count
    assert half.copies == half.buffers == 0
    assert cli.main(["memory", "someone/a-model"]) == 1
    assert "expected a folder with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("logits", "perturbation"), [(1, "inplace"), (256, "inplace"), (1, "out_of_place")]
)
def test_memory_computed_is_memory_measured(config, logits, perturbation):
    setup = needs.Setup(16, 256, logits, perturbation=perturbation)
    computed, seen = needs.needs(config, setup), needs.measured(config, setup)
    if seen is None:
        pytest.skip("this system does not let a process reset its peak")
    # torch's kernels and Python have some MiB of their own, which no tensor shows. What is computed
    # here is of 65 MiB and more, and the copies out of place are 20 MiB.
    allowed = dict(rel=0.05, abs=8 * 2**20)
    assert seen.forward == pytest.approx(computed.forward, **allowed)
    assert seen.step == pytest.approx(computed.step - computed.weights, **allowed)
