"""The command line: options, errors, exit codes, and what it does not import."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import errors
from vggrepro import cli
from vggrepro.cli import main
from vggrepro.config import ARCHITECTURES, TrainConfig
from vggrepro.config_options import command_line, given_values
from vggrepro.run_directory import RunDirectory

RUN_MAIN = "import sys; from vggrepro.cli import main; code = main(sys.argv[1:]); "
VALIDATION = {
    "val_loss": 1.5,
    "val_top1_error": 40.0,
    "val_top5_error": 12.5,
    "val_images": 200.0,
}


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", **environment},
    )


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Replaces the trainer; returns what it was called with."""
    calls = SimpleNamespace(status="finished", error=None)

    def train(config, run_dir, hooks, resume, strict, recipe_name, engine):
        calls.config, calls.run_dir, calls.resume, calls.strict = config, run_dir, resume, strict
        calls.recipe_name = recipe_name
        if calls.error is not None:
            raise calls.error
        return SimpleNamespace(
            run_dir=run_dir, status=calls.status, steps=config.steps, metrics=VALIDATION
        )

    monkeypatch.setattr("vggrepro.trainer.train", train)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.fixture
def failing(monkeypatch):
    """Makes the command line run a command that raises."""

    def install(error: BaseException) -> None:
        def run(options):
            raise error

        parser = SimpleNamespace(parse_args=lambda arguments: SimpleNamespace(run=run))
        monkeypatch.setattr(cli, "build_parser", lambda: parser)

    return install


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["data", "make", "--help"]],
    ids=" ".join,
)
def test_light_commands_do_not_import_tensorflow(arguments):
    done = run_python(
        RUN_MAIN + "print(sorted({'tensorflow', 'keras'} & set(sys.modules))); exit(code)",
        *arguments,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_help_answers_in_half_a_second():
    def seconds() -> float:
        # Processor time: other work on the machine must not fail this.
        before = os.times()
        run_python(RUN_MAIN, "--help")
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    assert 0 < min(seconds() for _ in range(3)) < 0.5


def test_help_names_the_paper_and_the_conflict_behind_init(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "initial learning rate. Default: 0.01 [paper: 0.01, 0.001]" in text
    assert "side of the crop fed to the net, pixels. Default: 32 [paper: 224]" in text
    assert "'normal with 10^-2 variance' reads as sigma=0.1" in text


@pytest.mark.parametrize("code", range(1, 6))
def test_a_tool_error_is_one_line_and_its_exit_code(failing, capsys, code):
    kinds = {kind.exit_code: kind for kind in _subclasses(errors.ToolError)}
    failing(kinds[code]("the thing [is]\nwrong", "Mend it"))
    assert main([]) == code
    captured = capsys.readouterr()
    assert captured.err == "error: the thing [is] wrong. Mend it\n"
    assert captured.out == ""


def _subclasses(kind: type) -> list[type]:
    return [kind] + [below for child in kind.__subclasses__() for below in _subclasses(child)]


def test_errors_are_red_on_a_terminal(failing, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    failing(errors.InputError("wrong"))
    main([])
    assert capsys.readouterr().err == "\x1b[31merror: wrong\x1b[0m\n"


def test_an_unexpected_exception_is_one_line_and_a_file(failing, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(ZeroDivisionError("a\nb"))
    assert main([]) == 1
    line = capsys.readouterr().err
    file = re.fullmatch(
        r"internal fault: ZeroDivisionError: a b \(traceback saved in (\S+); "
        r"set VGGREPRO_TRACEBACK=1 to show\)\n",
        line,
    )
    assert file is not None
    assert "Traceback (most recent call last)" in Path(file[1]).read_text()
    assert "ZeroDivisionError: a\nb" in Path(file[1]).read_text()


def test_the_traceback_is_shown_on_request(failing, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("VGGREPRO_TRACEBACK", "1")
    failing(ZeroDivisionError("oops"))
    assert main([]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_keyboard_interrupt_is_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("argument", ["--help", "recipes"])
def test_a_closed_pipe_is_silent(argument):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_MAIN + "exit(code)", argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_missing_tensorflow_is_one_line_naming_the_extras(tmp_path):
    done = run_python(
        "import sys; sys.modules['tensorflow'] = None\n" + RUN_MAIN + "exit(code)",
        "train",
        VGGREPRO_CACHE=str(tmp_path),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "vggrepro[cpu]" in done.stderr and "vggrepro[tpu]" in done.stderr


def test_tensorflow_log_level_is_set_only_if_the_user_did_not(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    main(["recipes"])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    main(["recipes"])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--step", "5"], "unrecognized arguments: --step 5 (did you mean --steps?)"),
        (["train", "--widht", "1"], "--widht 1 (did you mean --width?). See vggrepro train --help"),
        (["diagnose-nan", "x", "--budget", "9"], "(did you mean --budget-seconds?)"),
        (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--arch", "F"], "arch='F' must be one of A, A-LRN, B, C, D, E"),
        (["train", "--init", "normal"], "init 'normal' is not an initialiser"),
        (["train", "--scale", "big"], "--scale 'big' is not MIN or MIN:MAX"),
        (["train", "--scale", "64:40"], "scale_max=40 is below scale_min"),
        (["train", "--recipe", "none"], "recipe 'none' does not exist. Known: demo, paper-A-256"),
        (["train", "--resume", "nowhere"], "nowhere is not a run directory"),
        (["data", "build", "here", "there", "--workers", "0"], "--workers must be positive"),
        (["data", "check", "here", "--workers", "-1"], "--workers -1 must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(trained, capsys, arguments, message):
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert message in line


def test_options_become_the_configuration(trained, tmp_path):
    (tmp_path / "images").mkdir()
    code = main(
        "train --arch D --width 0.5 --init normal:0.1 --lr 0.5 --no-flip --decay-biases "
        "--warmup-steps 7 --clip-norm 2 --data images --run-dir mine --scale 40:50".split()
    )
    assert code == 0
    assert trained.config == TrainConfig(
        arch="D",
        width=0.5,
        init="normal:0.1",
        lr=0.5,
        flip=False,
        decay_biases=True,
        warmup_steps=7,
        clip_norm=2.0,
        scale_min=40,
        scale_max=50,
        data=str(tmp_path / "images"),
    )
    assert trained.run_dir == Path("mine")
    assert trained.resume is False and trained.strict is False


@given(
    arch=st.sampled_from(ARCHITECTURES),
    lr=st.floats(min_value=1e-30, max_value=1e30),
    flip=st.booleans(),
    decay_biases=st.booleans(),
    side=st.integers(1, 500),
    margins=st.tuples(st.integers(0, 99), st.integers(0, 99)) | st.none(),
)
def test_the_command_of_a_configuration_gives_that_configuration(
    arch, lr, flip, decay_biases, side, margins
):
    smallest = round(side * 256 / 224) if margins is None else side + margins[0]
    config = TrainConfig(
        arch=arch,
        lr=lr,
        flip=flip,
        decay_biases=decay_biases,
        image_size=side,
        scale_min=smallest,
        scale_max=smallest + (margins[1] if margins else 0),
        data="a b",
    )
    program, *words = shlex.split(command_line(config))
    options = cli.build_parser().parse_args(words)
    assert program == "vggrepro"
    assert TrainConfig(**given_values(options)) == config


@pytest.mark.parametrize(
    "options, scales",
    [
        ("", (37, 37)),
        ("--image-size 224", (256, 256)),
        ("--image-size 64 --scale 64", (64, 64)),
        ("--recipe paper-A-256", (256, 256)),
        ("--recipe paper-A-256 --scale 256:512", (256, 512)),
        ("--recipe paper-A-256 --image-size 112", (128, 128)),
    ],
)
def test_the_scale_follows_the_image_size_unless_given(trained, options, scales):
    assert main(["train", "--data", ".", *options.split()]) == 0
    assert (trained.config.scale_min, trained.config.scale_max) == scales


def test_options_override_a_recipe(trained):
    options = "--recipe paper-E-256 --init-from A --steps 10"
    assert main(["train", "--data", ".", *options.split()]) == 0
    assert trained.recipe_name == "paper-E-256" and trained.config.init_from.endswith("/A")
    assert (trained.config.arch, trained.config.width, trained.config.steps) == ("E", 1.0, 10)


def test_no_option_makes_images_and_a_dated_run_directory(trained, monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr(
        "vggrepro.synthetic.ensure_synthetic", lambda path: made.append(path) or path
    )
    monkeypatch.setenv("VGGREPRO_CACHE", str(tmp_path / "cache"))
    assert main(["train"]) == 0
    assert made == [tmp_path / "cache" / "synthetic"]
    assert trained.config.data == str(made[0])
    assert re.fullmatch(r"runs/\d{8}-\d{6}-A-glorot-uniform", str(trained.run_dir))
    output = capsys.readouterr().out
    assert f"making synthetic images in {made[0]}" in output
    assert "top-1 error 40.00 %, top-5 error 12.50 %" in output
    assert f"tensorboard --logdir {trained.run_dir}/tensorboard" in output
    assert f"vggrepro evaluate {trained.run_dir} --protocol dense" in output
    assert f"vggrepro train --resume {trained.run_dir} --steps MORE" in output


def test_strict_reaches_the_trainer(trained):
    assert main("train --data . --strict".split()) == 0
    assert trained.strict is True


def test_an_interrupted_run_says_how_to_go_on_and_exits_130(trained, capsys):
    trained.status = "interrupted"
    assert main("train --data . --run-dir mine".split()) == 130
    assert "vggrepro train --resume mine\n" in capsys.readouterr().out


def test_a_run_stopped_by_the_guard_exits_3(trained, capsys):
    trained.error = errors.StoppedByGuard("step 1: x is not finite", "Next: diagnose")
    assert main("train --data .".split()) == 3
    assert capsys.readouterr().err == "error: step 1: x is not finite. Next: diagnose\n"


@pytest.fixture
def stored_run(tmp_path):
    config = TrainConfig(lr=0.5, steps=20, data=str(tmp_path))
    RunDirectory.create(tmp_path / "run", config.to_dict(), {}).close()
    return config


@pytest.mark.parametrize("options", ["", "--lr 0.5", "--steps 30"])
def test_resume_takes_the_run_s_configuration(trained, stored_run, tmp_path, options):
    assert main(["train", "--resume", str(tmp_path / "run"), *options.split()]) == 0
    steps = 30 if "--steps" in options else 20
    assert trained.resume is True
    assert trained.config.to_dict() == {**stored_run.to_dict(), "steps": steps}


@pytest.mark.parametrize(
    "options, named",
    [
        ("--lr 0.1", "--lr"),
        ("--steps 30 --seed 3", "--seed"),
        ("--scale 64", "--scale"),
        ("--run-dir other", "--run-dir"),
        ("--recipe demo", "--recipe"),
    ],
)
def test_resume_refuses_any_other_change(trained, stored_run, tmp_path, capsys, options, named):
    assert main(["train", "--resume", str(tmp_path / "run"), *options.split()]) == 2
    line = capsys.readouterr().err
    assert f"error: {named} cannot be changed when resuming" in line
    assert not hasattr(trained, "config")


def test_data_make_makes_the_files(tmp_path, capsys):
    arguments = ["--classes", "2", "--train-per-class", "3", "--val-per-class", "1"]
    assert main(["data", "make", str(tmp_path / "made"), *arguments]) == 0
    assert len(list((tmp_path / "made" / "train").glob("*/*.JPEG"))) == 6
    assert len(list((tmp_path / "made" / "val").glob("*/*.JPEG"))) == 2
    assert capsys.readouterr().out == f"8 images of 2 classes in {tmp_path}/made\n"


def test_recipes_lists_and_shows(capsys):
    assert main(["recipes"]) == 0
    assert "paper-A-LRN-256" in capsys.readouterr().out
    assert main(["recipes", "paper-D-256"]) == 0
    shown = capsys.readouterr().out
    assert "vggrepro train --recipe paper-D-256" in shown
    assert "Table 3 (dense, Q=256) 27.0/8.8" in shown
    assert re.search(r"^  init +normal:0.01 +interpretation$", shown, re.MULTILINE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from vggrepro.synthetic import ensure_synthetic

    directory = tmp_path_factory.mktemp("data") / "images"
    return ensure_synthetic(directory, classes=2, train_per_class=4, val_per_class=2)


def test_a_real_run_trains_resumes_and_leaves_its_files(images, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--data", str(images), "--width", "0.02", "--batch-size", "4"]
    assert main(["train", *small, "--steps", "3", "--run-dir", "run"]) == 0
    first = capsys.readouterr().out
    assert "step 3/3" in first and "validation top-1 error" in first
    assert main(["train", "--resume", "run", "--steps", "5"]) == 0
    assert "from step 3" in capsys.readouterr().out
    with RunDirectory.open("run") as run:
        assert run.manifest()["status"] == "finished"
        steps = [record["step"] for record in run.metrics() if "loss" in record]
    assert steps == [0, 1, 2, 3, 4]
    assert list(Path("run/tensorboard").glob("events.out.tfevents.*"))


def test_a_real_run_that_explodes_exits_3_and_leaves_an_incident(
    images, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    small = ["--data", str(images), "--width", "0.02", "--batch-size", "4", "--steps", "9"]
    assert main(["train", *small, "--init", "normal:1000", "--run-dir", "run"]) == 3
    line = capsys.readouterr().err
    assert line.startswith("error: step ") and line.count("\n") == 1
    assert "vggrepro diagnose-nan run" in line
    assert len(list(Path("run/incidents").iterdir())) == 1
