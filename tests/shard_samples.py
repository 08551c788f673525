"""A small directory of images, and its shards."""

from pathlib import Path

from jpeg_samples import jpeg, pixels

from vggrepro.image_inspection import KINDS
from vggrepro.shard_build import build_shards
from vggrepro.shard_writer import Recipe


def make_folder(root: Path, train: int = 150, val: int = 7) -> Path:
    """Three classes of images of 12 to 30 pixels in the ILSVRC layout; some greyscale."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            folder = root / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            image = pixels(12 + i % 19, 30 - i % 17, seed=i)
            data = jpeg(image[..., :1] if i % 40 == 7 else image)
            (folder / f"{split}_{i:04d}.JPEG").write_bytes(data)
    return root


def recipe(resize: int = 0, **policy: str) -> Recipe:
    """The default policy but for what is given (with _ for -)."""
    changes = {kind.replace("_", "-"): action for kind, action in policy.items()}
    return Recipe({**KINDS, **changes}, resize)


def build(source: Path, target: Path | str, workers: int = 2, **options: object) -> dict:
    """Shards of about 20 images."""
    return build_shards(str(source), str(target), recipe(**options), 20_000, workers)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory but the lock, by name."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != ".lock"
    }
