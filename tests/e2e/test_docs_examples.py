"""The curl lines of the README and the tutorials, pasted into a shell as a reader would.

Those about VoxCPM meet a server whose cache holds tiny checkpoints under the models' real names,
in the layout of the hub's client; the others meet a server as a newcomer has it.
"""

import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from tests.checkpoints import Architecture, build_checkpoint
from tests.recordings import make_recording
from tests.servers import Running, make_settings, server_process, serving

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"
PAGES = ("README.md", "docs/tutorials/first-speech.md", "docs/tutorials/first-clone.md")
MODELS: dict[str, Architecture] = {
    "openbmb/VoxCPM-0.5B": "voxcpm-0.5b",
    "openbmb/VoxCPM2": "voxcpm2",
}

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on this machine"),
]


@dataclass(frozen=True)
class Example:
    """A block that a reader pastes into a shell."""

    page: str
    number: int
    command: str

    @property
    def needs_voxcpm(self) -> bool:
        """Whether it names a VoxCPM model, or asks for a clone."""
        return "VoxCPM" in self.command or "/clone" in self.command

    @property
    def output(self) -> str | None:
        """The file that curl writes, if it writes one."""
        match = re.search(r"-o (\S+)", self.command)
        return match[1] if match else None


def _examples() -> list[Example]:
    """Every block of shell that begins with curl and asks our server, in the order of the pages."""
    blocks = [
        (page, block)
        for page in PAGES
        for block in re.findall(
            r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S
        )
    ]
    return [
        Example(page, number, block)
        for number, (page, block) in enumerate(blocks, 1)
        if block.startswith("curl ") and ADDRESS in block
    ]


def _fill_cache(directory: Path) -> None:
    """Weights as the hub's client leaves them: a snapshot of a commit, and what `main` is."""
    for name, architecture in MODELS.items():
        repository = directory / f"models--{name.replace('/', '--')}"
        commit = f"{len(name):040x}"
        build_checkpoint(repository / "snapshots" / commit, architecture, stops=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit, encoding="ascii")


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with VoxCPM on disk; in this process, which has imported the library already."""
    cache_dir = tmp_path_factory.mktemp("stocked")
    _fill_cache(cache_dir)
    with serving(make_settings(cache_dir)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader's shell is, with the recording that the pages speak of."""
    directory = tmp_path_factory.mktemp("reader")
    (directory / "voice.wav").write_bytes(make_recording(2.0, 16_000, "wav", 1))
    (directory / ".curlrc").write_text("fail\nshow-error\nnoproxy = *\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    "example", _examples(), ids=lambda one: f"{Path(one.page).stem}-{one.number}"
)
def test_an_example_works_when_pasted(
    example: Example, bare: Running, stocked: Running, folder: Path
) -> None:
    server = stocked if example.needs_voxcpm else bare
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.command.replace(ADDRESS, server.url)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},  # curl fails on a 4xx or 5xx
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if example.output:
        audio, _ = soundfile.read(io.BytesIO((folder / example.output).read_bytes()))
        assert audio.any()
    else:
        assert result.stdout


def test_the_pages_have_examples_of_both_kinds() -> None:
    assert {example.page for example in _examples()} == set(PAGES)
    assert {example.needs_voxcpm for example in _examples()} == {True, False}
    assert any("/clone" in example.command for example in _examples())


def test_the_first_example_is_what_the_server_prints(tmp_path: Path) -> None:
    with server_process(tmp_path, HF_HUB_OFFLINE="1") as server:
        printed = server.startup_text.replace(server.url, ADDRESS)
    for page in PAGES[:2]:
        first = next(example for example in _examples() if example.page == page)
        assert " ".join(first.command.split()) in " ".join(printed.split())
