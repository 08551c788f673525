"""TensorFlow's greetings stay off the terminal; what it complains of does not."""

import subprocess
import sys
from pathlib import Path

import pytest

GREETING = "I0000 00:00:1795590730.242765   17117 port.cc:153] oneDNN custom operations are on."
COMPLAINT = "E0000 00:00:1795590730.242765   17117 cuda.cc:1] no driver"
PREAMBLE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"


def import_of(content: str, folder: Path, quiet: bool) -> subprocess.CompletedProcess[str]:
    """Imports a stand-in for TensorFlow that writes to descriptor 2 as C++ does."""
    (folder / "tensorflow.py").write_text(
        f"import os\nos.write(2, {content!r}.encode())\nVALUE = 3\n"
    )
    install = "from vggrepro import quiet_import; quiet_import.install();" if quiet else ""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {install}"
    code += (
        "import tensorflow; import tensorflow; print(tensorflow.VALUE, tensorflow.__spec__.loader)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_only_information_is_held_back(tmp_path):
    content = f"{PREAMBLE}\n{GREETING}\n{COMPLAINT}\nlast words"
    assert GREETING in import_of(content, tmp_path, quiet=False).stderr
    done = import_of(content, tmp_path, quiet=True)
    assert done.stderr == f"{COMPLAINT}\nlast words"
    assert done.stdout.startswith("3 ") and "quiet_import" not in done.stdout


def test_a_failing_import_keeps_its_words(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        f"import os\nos.write(2, b'{COMPLAINT}\\n')\nraise ImportError('no libtpu')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from vggrepro import quiet_import; quiet_import.install()\nimport tensorflow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert COMPLAINT in done.stderr and "no libtpu" in done.stderr and done.returncode == 1


@pytest.mark.parametrize("times", [1, 2])
def test_installed_once(times):
    code = "import sys; from vggrepro import quiet_import\n" + "quiet_import.install()\n" * times
    code += "print(sum('quiet_import' in type(f).__module__ for f in sys.meta_path))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
