"""Does it do what it says? Run with `pytest -q`: no GPU, no network, no data set needed,
five minutes on two CPU cores. `python test_smoke.py bench` measures instead.

Every command-line test uses a made data set of two classes and a random teacher at 64 x 64: cada.py
a ResNet-18, cnc.py its tiny CLIP. What the two share is tested in cada.py only, and that the copies
are equal. `-k cnc` runs the tests of cnc.py.
"""
import ast
import csv
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pkgutil
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
THREADS = 1  # the tensors are so small that a second thread costs more than it gains
FLAGS = ("--image-size 64 --teacher resnet18 --weights none --iters 4 --batch-size 4 "
         "--workers 0 --device cpu").split()
TINY = dict(image_size=64, teacher="resnet18", weights="none", device="cpu")
CNC_FLAGS = ("--image-size 64 --teacher tiny --weights none --epochs 2 --theta 1 --batch-size 4 "
             "--workers 0 --device cpu").split()  # six steps, the first three of them warm-up
CNC_TINY = dict(image_size=64, teacher="tiny", weights="none", device="cpu")
FLAGS_OF = {cada: FLAGS, cnc: CNC_FLAGS}
DETECTOR_OF = {cada: cada.RevDist, cnc: cnc.CNC}
torch.set_num_threads(THREADS)


# ---- helpers -------------------------------------------------------------------------------------
def draw(rng, kind: str, size: tuple[int, int], hole: bool) -> tuple[Image.Image, Image.Image]:
    """A small image, smooth (kind "a") or grainy ("b"), and its mask; `hole` punches a defect."""
    pixels = rng.normal(0, 60, (size[1], size[0], 3))
    if kind == "a":
        pixels = 8 * ndimage.gaussian_filter(pixels, (6, 6, 0))
    image = Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", size)
    if hole:
        x, y = (int(rng.integers(5, s - 25)) for s in size)
        ImageDraw.Draw(image).ellipse((x, y, x + 18, y + 14), fill=(250, 20, 20))
        ImageDraw.Draw(mask).ellipse((x, y, x + 18, y + 14), fill=255)
    return image, mask


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


SAVE = cada.save_checkpoint, cnc.save_checkpoint


def run(*words, script=cada, everything=False) -> int:
    """The command line, in this process; not `everything`: without what takes longer than all the
    rest, to draw the pictures and to save checkpoints of a quarter gigabyte at every step."""
    with pytest.MonkeyPatch.context() as m:
        if not everything:
            m.setattr(Figure, "savefig", lambda self, path, **more: path.write_bytes(b"picture"))
            for module, save in zip((cada, cnc), SAVE):
                if module.save_checkpoint is save:  # else a test has put in another
                    m.setattr(module, "save_checkpoint", lambda path, content, save=save:
                              "threshold" in content and save(path, content))
        return script.main([str(w) for w in words])


def shell(*words, **more) -> subprocess.CompletedProcess:
    """Python as a user starts it."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}, **more)


def rows_of(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path, *names: str) -> np.ndarray:
    """Columns of scores.csv as (rows, columns)."""
    return np.array([[float(row[name]) for name in names] for row in rows_of(out)])


def results(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["results"]


def listing(folder: Path) -> dict[Path, int]:
    """Every file below a folder with its size, but the lock; {} for a folder that is not there."""
    return {p: p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def auroc(scores, labels, classes=None) -> float:
    """Pooled AUROC, or with `classes` the mean over classes."""
    if classes is None:
        return roc_auc_score(labels, scores)
    return np.mean([roc_auc_score(labels[classes == c], scores[classes == c])
                    for c in np.unique(classes)])


@pytest.fixture
def tmp_path():
    """Instead of pytest's own, which keeps the folders of three sessions: checkpoints are large."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def session_path():
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def data(session_path) -> Path:
    """Two classes, 6 training and 3 + 3 test images each. Tests that spoil it use `tree`."""
    rng, root = np.random.default_rng(0), session_path / "data"
    for kind, size in (("a", (64, 64)), ("b", (80, 64))):
        for part, count in (("train/good", 6), ("test/good", 3), ("test/hole", 3)):
            for i in range(count):
                image, mask = draw(rng, kind, size, part == "test/hole")
                save(image, root / kind / part / f"{i:03}.png")
                if part == "test/hole":
                    save(mask, root / kind / "ground_truth/hole" / f"{i:03}_mask.png")
    return root


@pytest.fixture
def tree(data, tmp_path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "tree"))


def train_from_the_shell(script, data: Path, out: Path) -> SimpleNamespace:
    """One training run: its folder, its checkpoint, what it printed."""
    done = shell(f"{script.__name__}.py", "--data", data, "--out", out, *FLAGS_OF[script],
                 "--cache", "ram", cwd=HERE)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, checkpoint=out / "checkpoint.pt", stdout=done.stdout,
                           stderr=done.stderr, files=set(listing(out)))


@pytest.fixture(scope="session")
def trained(data, session_path) -> SimpleNamespace:
    return train_from_the_shell(cada, data, session_path / "trained")


@pytest.fixture(scope="session")
def cnc_trained(data, session_path) -> SimpleNamespace:
    return train_from_the_shell(cnc, data, session_path / "cnc_trained")


# ---- data ----------------------------------------------------------------------------------------
GRADIENT = np.add.outer(np.arange(0, 120, 3), np.arange(0, 100, 2)).astype(np.uint8)  # (40, 50)
COLOURS = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=-1)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    indices = Image.fromarray((GRADIENT % 4).astype(np.uint8), "P")
    palette = np.array([(250, 0, 0), (0, 240, 10), (5, 5, 200), (90, 90, 90)], np.uint8)
    indices.putpalette(palette.ravel().tolist())
    return indices, palette[GRADIENT % 4]


def image_modes() -> dict[str, tuple[Image.Image, str, np.ndarray]]:
    """{what: (image, suffix, the RGB pixels it must be read as)}."""
    rgba = np.dstack([COLOURS, GRADIENT])  # alpha varies and must not matter
    cyan = Image.new("CMYK", (50, 40), (255, 0, 0, 0))
    return {"rgb": (Image.fromarray(COLOURS), ".png", COLOURS),
            "grey": (Image.fromarray(GRADIENT), ".png", grey(GRADIENT)),
            "grey 16 bit png": (Image.fromarray(GRADIENT.astype(np.uint16) * 257), ".png",
                                grey(GRADIENT)),
            "grey 16 bit tiff": (Image.fromarray(GRADIENT.astype(np.uint16) * 257), ".TIFF",
                                 grey(GRADIENT)),
            "palette": (palette_image()[0], ".png", palette_image()[1]),
            "rgba": (Image.fromarray(rgba), ".png", COLOURS),
            "black and white": (Image.fromarray(GRADIENT > 99), ".png",
                                grey((GRADIENT > 99) * np.uint8(255))),
            "cmyk tiff": (cyan, ".tif", np.full((40, 50, 3), (0, 255, 255))),
            "cmyk jpeg": (cyan, ".JPG", np.full((40, 50, 3), (0, 255, 255)))}


@pytest.mark.parametrize("what", image_modes())
def test_every_kind_of_image_is_read_as_8_bit_rgb(what, tmp_path):
    image, suffix, expected = image_modes()[what]
    read = cada.load_image(save(image, tmp_path / ("image" + suffix)))
    assert read.mode == "RGB"
    tolerance = 2 if "jpeg" in what else 0
    np.testing.assert_allclose(np.asarray(read).astype(int), expected, atol=tolerance)


@pytest.mark.parametrize("orientation, upright", [
    (1, COLOURS), (3, COLOURS[::-1, ::-1]), (6, np.rot90(COLOURS, -1)), (8, np.rot90(COLOURS))])
def test_exif_orientation_is_respected(orientation, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(COLOURS), tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(cada.load_image(path)), upright)


def test_reads_an_mvtec_tree(data):
    train, test = cada.read_dataset(data)
    assert [(s.cls, s.label, s.mask) for s in train] == [("a", 0, None)] * 6 + [("b", 0, None)] * 6
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert [s.mask.name for s in test if s.label] == [f"{i:03}_mask.png" for i in range(3)] * 2
    assert not any(s.mask for s in test if not s.label)


def test_the_folder_of_one_class_is_a_data_set(data):
    train, test = cada.read_dataset(data / "b")
    assert len(train) == 6 and {s.cls for s in train + test} == {"b"}


def test_masks_are_paired_by_stem(tree):
    """`000` and `000_mask` both fit, and a mask that sorts first does not shift the others."""
    masks, images = tree / "a/ground_truth/hole", tree / "a/test/hole"
    (masks / "000_mask.png").rename(masks / "000.png")
    (masks / "002_mask.png").rename(masks / "0_mask.png")
    (images / "002.png").rename(images / "0.png")
    pairs = {s.path.stem: s.mask.stem for s in cada.read_dataset(tree / "a")[1] if s.mask}
    assert pairs == {"000": "000", "001": "001_mask", "0": "0_mask"}


def test_upper_case_is_read_and_hidden_files_are_not(tree):
    folder = tree / "a/train/good"
    (folder / "000.png").rename(folder / "000.PNG")
    for name in (".hidden.png", "._001.png", "Thumbs.db", "notes.txt"):
        (folder / name).write_bytes(b"no image")
        (tree / "a/ground_truth/hole" / name).write_bytes(b"no mask")
    names = [s.path.name for s in cada.read_dataset(tree)[0] if s.cls == "a"]
    assert names == ["000.PNG"] + [f"{i:03}.png" for i in range(1, 6)]


@pytest.fixture
def visa(tmp_path) -> Path:
    """A raw VisA tree: JPEGs of 80 x 48, mask values 1-9, one defect of a single pixel."""
    rng, root = np.random.default_rng(1), tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for cls in ("candle", "pcb1"):
        for i in range(5):
            path = f"{cls}/Data/Images/Normal/{i:04}.JPG"
            save(draw(rng, "a", (80, 48), False)[0], root / path)
            lines.append(f"{cls},{'train' if i < 3 else 'test'},normal,{path},")
        for i in range(3):
            path = f"{cls}/Data/Images/Anomaly/{i:03}.JPG"
            mask = f"{cls}/Data/Masks/Anomaly/{i:03}.png"
            save(draw(rng, "a", (80, 48), True)[0], root / path)
            values = np.zeros((48, 80), np.uint8)
            if i == 0:
                values[1, 2] = 1  # falls between the pixels of a 32 x 32 mask
            else:
                values[10:30, 20:60] = rng.integers(1, 10, (20, 40))
            save(Image.fromarray(values), root / mask)
            lines.append(f"{cls},test,anomaly,{path},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_reads_a_raw_visa_tree(visa):
    train, test = cada.read_dataset(visa)
    assert [(s.cls, s.label) for s in train] == [("candle", 0)] * 3 + [("pcb1", 0)] * 3
    assert [s.label for s in test] == [0, 0, 1, 1, 1] * 2
    assert test[3].path == visa / "candle/Data/Images/Anomaly/001.JPG"
    assert test[3].mask == visa / "candle/Data/Masks/Anomaly/001.png"


def test_masks_are_binarised_and_resized_as_the_image_is(visa):
    masks = cada.load_masks(cada.read_dataset(visa)[1], 40)
    assert masks.dtype == torch.bool and masks.shape == (10, 40, 40)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[8:25, 10:30] = True  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    assert (masks[3] == expected).all() and not masks[0].any()


def test_a_tiny_defect_keeps_its_label(visa):
    _, test = cada.read_dataset(visa)
    assert test[2].label == 1 and not cada.load_masks(test, 32)[2].any()


def test_a_set_without_masks_has_none(tree):
    for cls in "ab":
        shutil.rmtree(tree / cls / "ground_truth")
    _, test = cada.read_dataset(tree)
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2 and cada.load_masks(test, 64) is None


def test_data_is_found_in_the_documented_order(tmp_path, monkeypatch):
    monkeypatch.setattr(cada, "HERE", tmp_path)
    for name in ("demo", "visa", "mvtec"):
        (tmp_path / "data" / name).mkdir(parents=True)
        assert cada.choose_data(None)[0] == tmp_path / "data" / name
    assert cada.choose_data("elsewhere")[0] == Path("elsewhere")


def test_defaults_are_published_ones_but_small_on_the_demo_set(data):
    real, _ = cada.configure({"data": str(data)})
    assert (real.teacher, real.weights) == ("wide_resnet50_2", "IMAGENET1K_V1")
    assert (real.image_size, real.batch_size, real.iters, real.lr) == (256, 16, 5000, 2e-3)
    demo, _ = cada.configure({"data": str(DEMO), "batch_size": 7})
    assert (demo.teacher, demo.weights, demo.image_size) == ("resnet18", "none", 128)
    assert demo.batch_size == 7  # a flag goes before both


def test_demo_set_is_what_it_claims():
    train, test = cada.read_dataset(DEMO)
    classes = sorted({s.cls for s in train})
    assert len(classes) >= 6
    for cls in classes:
        labels = [s.label for s in test if s.cls == cls]
        assert sum(s.cls == cls for s in train) >= 40
        assert labels.count(0) >= 16 and labels.count(1) >= 16
        assert len(list((DEMO / cls / "ground_truth").iterdir())) >= 4
    shares = [cada.load_mask(s.mask).mean() for s in test if s.label]
    assert min(shares) > 0 and max(shares) > 0.2 and np.quantile(shares, 0.1) < 0.02
    assert sum(listing(DEMO).values()) < 4e6


def test_demo_set_is_made_again_from_its_seed(tmp_path):
    spec = importlib.util.spec_from_file_location("prepare", HERE / "data/prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.write_class(tmp_path, "pill", 0)
    again, kept = ({p.relative_to(root): np.asarray(Image.open(p)).astype(int)
                    for p in root.glob("pill/**/*.*")} for root in (tmp_path, DEMO))
    assert again.keys() == kept.keys()
    # Not byte for byte: JPEG libraries round differently.
    assert max(np.abs(again[p] - kept[p]).mean() for p in kept) < 1


# ---- teacher and student -------------------------------------------------------------------------
def millions(*modules) -> float:
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)


def test_parameters_of_wide_resnet50_2():
    with torch.device("meta"):
        student = cada.Student("wide_resnet50_2")
        teacher = cada.Teacher("wide_resnet50_2", "none", 0)
    assert millions(student.fuse1, student.fuse2) == 10.62
    assert millions(student.bottleneck) == 48.26
    decoder = student.decode3, student.decode2, student.decode1
    assert [millions(stage) for stage in decoder] == [17.84, 5.32, 1.76]
    assert millions(student) == 83.80
    layers = teacher.layer1, teacher.layer2, teacher.layer3
    assert [millions(layer) for layer in layers] == [0.63, 3.48, 20.74]
    assert millions(teacher) == millions(teacher.stem, *layers)  # layer4 is not there


@pytest.mark.parametrize("name, c1", [("wide_resnet50_2", 256), ("resnet18", 64), ("resnet34", 64),
                                      ("resnet50", 256), ("resnext50_32x4d", 256)])
def test_shapes(name, c1):
    with torch.device("meta"):
        teacher, student = cada.Teacher(name, "none", 0), cada.Student(name)
        encoded = teacher(torch.empty(2, 3, 256, 256))
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [f.shape for f in encoded] == shapes
    assert [d.shape for d in student([f.float() for f in encoded])] == shapes
    fused = torch.empty(2, 12 * c1, 16, 16, device="meta")
    assert student.bottleneck(fused).shape == (2, 512 * c1 // 64, 8, 8)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return cada.RevDist(cada.Config(**TINY))


def random_images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_gradients_reach_the_student_only(detector):
    before = {k: v.clone() for k, v in detector.teacher.state_dict().items()}
    detector.train()
    detector(detector.teacher(random_images(4))).backward()
    assert all(p.grad is None and not p.requires_grad for p in detector.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in detector.student.parameters())
    after = detector.teacher.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # running statistics included


def test_teacher_depends_on_its_seed_alone():
    first = cada.Teacher("resnet18", "none", 0).identity()
    torch.rand(5)
    assert cada.Teacher("resnet18", "none", 0).identity() == first
    assert cada.Teacher("resnet18", "none", 1).identity() != first


def test_random_teacher_takes_batchnorm_statistics_from_the_images(detector):
    teacher, batches = detector.teacher, random_images(6).mul(3).add(1).split(3)
    teacher.estimate_statistics(batches)
    seen = torch.stack([teacher.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(teacher.stem[1].running_mean, seen, rtol=1e-3, atol=1e-4)
    before = teacher.identity()
    teacher(batches[0])
    assert teacher.identity() == before  # frozen again


def test_loss_and_map_are_cosine_distances(detector):
    features = detector.teacher(random_images(2))
    for sign, distance in ((1, 0.0), (-1, 2.0)):
        detector.student.forward = lambda encoded, sign=sign: [sign * e for e in encoded]
        assert detector(features).item() == pytest.approx(3 * distance, abs=1e-4)
        pooled, maps = detector.describe(features)
        assert len(pooled) == 2 and pooled.ndim == 2 and maps.shape == (2, 64, 64)
        torch.testing.assert_close(maps, torch.full_like(maps, distance), rtol=0, atol=1e-4)


def test_position_loss_ignores_the_length_of_a_vector_and_flat_loss_does_not(detector):
    features = detector.teacher(random_images(2))

    def lengthen_a_corner(encoded):
        return [torch.cat([9 * e[..., :1], e[..., 1:]], dim=-1) for e in encoded]

    detector.student.forward = lengthen_a_corner
    assert detector(features).item() > 0.1
    detector.flat = False
    assert detector(features).item() == pytest.approx(0, abs=1e-4)


def test_bfloat16_student_is_close_to_float32(detector, monkeypatch):
    features = detector.eval().teacher(random_images(2))
    with torch.no_grad():
        exact, exact_loss = detector.describe(features)[1], detector(features)
        monkeypatch.setattr(cada, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
        assert detector.student([f.float() for f in features])[0].dtype == torch.float32
        maps, loss = detector.describe(features)[1], detector(features)
    assert maps.dtype == loss.dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    torch.testing.assert_close(maps, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(loss, exact_loss, rtol=0, atol=0.02)


# ---- map and score -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [32, 64, 96, 256])
def test_smoothing_is_scipys(size):
    maps = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0))
    expected = [ndimage.gaussian_filter(m, 4 * size / 256, mode="nearest") for m in maps.numpy()]
    np.testing.assert_allclose(cada.smooth(maps).numpy(), expected, atol=1e-5)


def test_smoothing_commutes_with_normalising():
    u, gamma = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.3, 0.9, 1.0])
    maps = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cada.smooth(cada.normalise(maps, u, gamma)),
                               cada.normalise(cada.smooth(maps), u, gamma), rtol=0, atol=1e-4)


def test_image_score_is_the_mean_of_the_top_percent():
    maps = torch.arange(200.0).reshape(1, 10, 20)
    assert cada.image_score(maps).tolist() == [198.5]


# ---- CADA ----------------------------------------------------------------------------------------
A, B = np.array([0.05, 0.2, 0.4, 0.1, 0.7]), np.array([0.02, 0.1, 0.05, 0.3, 0.15])


def five_classes(seed: int, per_class: int, anomalous: bool):
    """Features around one centre a class; maps a_c + b_c * noise, anomalous ones with a raised
    patch. Returns features, maps, labels, classes."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(5), per_class)
    labels = np.tile(np.arange(per_class) % 2, 5) * anomalous
    centres = np.random.default_rng(0).normal(size=(5, 64))
    features = centres[classes] + 0.3 * rng.normal(size=(len(classes), 64))
    noise = np.abs(rng.normal(size=(len(classes), 32, 32)))
    noise[:, 10:13, 10:13] += 2.5 * labels[:, None, None]
    maps = A[classes][:, None, None] + B[classes][:, None, None] * noise
    return torch.tensor(features).float(), torch.tensor(maps).float(), labels, classes


@pytest.fixture(scope="module")
def fitted():
    features, maps, *_ = five_classes(1, 40, anomalous=False)
    torch.manual_seed(0)
    return cada.CADA(64).fit(features, maps, seed=0)


def test_cada_undoes_the_distortion_of_each_class(fitted):
    _, normal_maps, _, of_class = five_classes(1, 40, anomalous=False)
    features, maps, labels, classes = five_classes(2, 40, anomalous=True)
    u, gamma = (torch.stack([m[of_class == c].mean() for c in range(5)])[classes]
                for m in (normal_maps.mean((1, 2)), normal_maps.amax((1, 2))))
    raw, aligned, oracle = (m.amax((1, 2)).numpy() for m in (
        maps, fitted.align(features, maps), cada.normalise(maps, u, gamma)))
    assert auroc(aligned, labels) > auroc(oracle, labels) - 0.03
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.15
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.02


def test_gamma_is_above_u_for_any_features(fitted):
    features, maps, *_ = five_classes(3, 4, anomalous=True)
    strange = torch.cat([features, features * 1e3, -features * 1e6, torch.zeros(1, 64),
                         torch.full((1, 64), 1e4), torch.eye(64)[:1] * 1e6])
    u, gamma = fitted.predict(strange)
    assert u.shape == gamma.shape == (len(strange),)
    assert u.isfinite().all() and gamma.isfinite().all() and (gamma > u).all()
    assert fitted.align(strange[-1:], maps[:1]).isfinite().all()


@pytest.mark.parametrize("images, maps", [
    (torch.randn(1, 64), torch.rand(1, 8, 8)),
    (torch.randn(3, 64), torch.rand(3, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)),
    (torch.randn(20, 64), torch.full((20, 8, 8), 100.0))],
    ids=["one image", "three images", "equal images", "maps without contrast"])
def test_gamma_is_above_u_for_any_training_set(images, maps):
    u, gamma = cada.CADA(64).fit(images, maps).predict(torch.cat([images, torch.randn(9, 64)]))
    assert u.isfinite().all() and gamma.isfinite().all() and (gamma > u).all()


def test_an_image_is_aligned_by_itself(fitted):
    """Neither its neighbours in the batch nor its own map change its u and gamma."""
    features, maps, *_ = five_classes(3, 4, anomalous=True)
    u, gamma = fitted.predict(features)
    torch.testing.assert_close(fitted.predict(features[3:4]), (u[3:4], gamma[3:4]))
    torch.testing.assert_close(fitted.align(features[3:5], maps[3:5]),
                               cada.normalise(maps[3:5], u[3:5], gamma[3:5]))


def test_a_fit_depends_on_its_seed_alone(fitted):
    features, maps, *_ = five_classes(1, 40, anomalous=False)
    torch.manual_seed(99)  # the fixture used another state
    again = cada.CADA(64).fit(features, maps, seed=0)
    for first, second in zip(fitted.predict(features), again.predict(features)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("odd", [1, 3])
def test_odd_images_do_not_merge_the_classes(odd):
    """One image far from all others is the best cut there is, and says nothing of the rest."""
    features, maps, *_ = five_classes(1, 40, anomalous=False)
    features[:odd] += 100 * torch.eye(odd, 64)
    head = cada.CADA(64).fit(features, maps)
    assert len(head.predict(features[odd:])[0].unique()) == 5


def test_implicit_classes_of_a_large_set_come_from_a_sample():
    rng = np.random.default_rng(0)
    x = np.repeat(8 * np.eye(4, 8), 700, axis=0) + rng.normal(size=(2800, 8))
    x = np.concatenate([x, np.full((1, 8), 500.0)]).astype(np.float32)
    labels = cada.implicit_classes(x, 10, seed=0).labels_
    assert [len(set(labels[i:i + 700])) for i in range(0, 2800, 700)] == [1] * 4
    assert len(set(labels)) == 5  # and the odd one


@pytest.mark.parametrize("features, maps", [
    ((9, 63), (9, 8, 8)), ((9, 64), (8, 8, 8)), ((9, 64), (9, 1, 8, 8))])
def test_a_fit_says_which_shapes_it_expects(features, maps):
    with pytest.raises(ValueError, match=r"\(N, 64\) and maps \(N, H, W\)"):
        cada.CADA(64).fit(torch.randn(features), torch.rand(maps))


def test_cada_is_not_told_the_class():
    assert list(inspect.signature(cada.CADA.fit).parameters) == ["self", "features", "maps", "seed"]
    assert list(inspect.signature(cada.CADA.predict).parameters) == ["self", "features"]
    assert list(inspect.signature(cada.CADA.align).parameters) == ["self", "features", "maps"]


@pytest.fixture(scope="module")
def demo_features():
    """({part: pooled features}, classes of the training images, classes of the test images) of a
    quarter of the demo images; parts: train, test (good ones), and those with a ruined patch."""
    train, test = cada.read_mvtec(DEMO)
    train, test = train[::4], [s for s in test if s.label == 0][::4]
    rng = np.random.default_rng(0)
    images = {part: [cada.load_image(s.path) for s in samples]
              for part, samples in (("train", train), ("test", test))}
    patches = {
        "one colour": lambda: Image.new("RGB", (24, 24), tuple(rng.integers(0, 256, 3).tolist())),
        "another image": lambda: images["test"][rng.integers(len(test))].crop((50, 50, 74, 74))}
    for name, patch in patches.items():
        images[name] = [i.copy() for i in images["test"]]
        for image in images[name]:
            image.paste(patch(), tuple(rng.integers(0, 104, 2).tolist()))
    detector = cada.RevDist(cada.Config(**TINY | {"image_size": 128})).eval()
    batches = {part: torch.stack([*map(detector.preprocess, images[part])]) for part in images}
    detector.teacher.estimate_statistics(batches["train"].split(16))
    with torch.no_grad():
        pooled = {part: detector.describe(detector.teacher(x))[0] for part, x in batches.items()}
    return pooled, [s.cls for s in train], [s.cls for s in test]


@pytest.mark.parametrize("patch", ["one colour", "another image"])
def test_a_ruined_patch_hardly_moves_u_and_gamma(patch, demo_features):
    """Nor does the patch's 3.5 % of the image make it another class."""
    pooled, classes, test_classes = demo_features
    scale = {c: 0.1 * 1.4 ** i for i, c in enumerate(sorted(set(classes)))}
    noise = torch.rand(len(classes), 32, 32, generator=torch.Generator().manual_seed(0))
    maps = torch.tensor([scale[c] for c in classes])[:, None, None] * (1 + noise)
    head = cada.CADA(pooled["train"].shape[1]).fit(pooled["train"], maps)
    truth = torch.tensor([1.5 * scale[c] for c in test_classes])
    assert (head.predict(pooled["test"])[0] / truth - 1).abs().median() < 0.15  # tells the classes
    for before, after in zip(head.predict(pooled["test"]), head.predict(pooled[patch])):
        assert ((after / before - 1).abs() < 0.05).float().mean() >= 0.9  # of the images


def test_a_detector_of_ones_own_is_aligned_as_the_readme_shows(monkeypatch):
    """Its block of Python, word for word."""
    monkeypatch.chdir(HERE)
    names = {}
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    labels, classes = (np.array([getattr(s, what) for s in names["test"]])
                       for what in ("label", "cls"))
    raw, aligned = (cada.image_score(cada.smooth(names[m])).numpy() for m in ("maps", "aligned"))
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.08
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.01


# ---- CNC: frozen teacher -------------------------------------------------------------------------
def cnc_detector(**flags) -> cnc.CNC:
    """In eval mode: dropout would blur every comparison."""
    torch.manual_seed(0)
    return cnc.CNC(cnc.Config(**CNC_TINY | flags)).eval()


@pytest.fixture(scope="module")
def clip_files(session_path) -> list[Path]:
    """Two files of weights for the tiny CLIP."""
    files = [session_path / f"clip-{seed}.pt" for seed in (0, 1)]
    for seed, file in enumerate(files):
        torch.save(cnc.Teacher(cnc.Config(**CNC_TINY, seed=seed)).clip.state_dict(), file)
    return files


@pytest.fixture(scope="module")
def tiny_clip(clip_files) -> cnc.Teacher:
    """To look at, not to change. From a file: a teacher with weights of its own is left alone."""
    return cnc.Teacher(cnc.Config(**CNC_TINY | {"weights": str(clip_files[0])}))


@pytest.fixture(scope="module")
def tokens(tiny_clip) -> list[torch.Tensor]:
    """What the teacher says of three images: a float16 tensor (3, 1 + N, C) for each tap."""
    return tiny_clip(random_images(3))


@pytest.fixture
def on_meta(monkeypatch):
    """open_clip's models without memory or numbers, of any size in no time."""
    create = open_clip.create_model

    def create_on_meta(*args, **more):
        with torch.device("meta"):
            return create(*args, device="meta", **more)

    monkeypatch.setattr(open_clip, "create_model", create_on_meta)


@pytest.mark.parametrize("name, size, patch, taps, width, joint", [
    ("ViT-B-32", 224, 32, [4, 8, 12], 768, 512), ("ViT-B-16", 224, 16, [4, 8, 12], 768, 512),
    ("ViT-L-14-336", 336, 14, [8, 16, 24], 1024, 768)])
def test_cnc_shapes(name, size, patch, taps, width, joint, on_meta):
    """Without the mixture, whose routing needs numbers; that it keeps shapes is tested below."""
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(teacher=name, weights="none", no_moe=True))
        features = detector.teacher(torch.empty(2, 3, size, size))
        encoded, decoded, _ = detector.decode(features)
        text = detector.prompts()
    assert detector.teacher.taps == taps and detector.preprocess.size == size
    assert detector.teacher.grid == size // patch
    shape = (2, 1 + (size // patch) ** 2, width)
    assert [(f.shape, f.dtype) for f in features] == [(shape, torch.float16)] * 3
    assert [f.shape for f in encoded] == [d.shape for d in decoded] == [shape] * 3
    assert detector.teacher.joint(encoded[0]).shape == (*shape[:2], joint)
    assert detector.prompts.ctx.shape[:3] == (3, 2, 12) and text.shape == (3, 2, joint)


def test_cnc_taps_are_the_outputs_of_the_blocks_named(clip_files):
    flags, seen = CNC_TINY | {"weights": str(clip_files[0]), "taps": "1,4,5"}, []
    teacher = cnc.Teacher(cnc.Config(**flags))
    for block in teacher.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    tapped = teacher(random_images(2))
    assert len(seen) == 5 and len(tapped) == 3  # block 6 was not run
    for number, tokens in zip((1, 4, 5), tapped):
        assert torch.equal(tokens, seen[number - 1].half())


def test_cnc_joint_space_is_clips(tiny_clip):
    """The last tap's CLS token, projected, is what CLIP itself says of the image."""
    images = random_images(2)
    expected = F.normalize(tiny_clip.clip.encode_image(images), dim=-1)
    found = tiny_clip.joint(tiny_clip(images)[-1].float())[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # tokens are float16


def test_cnc_images_are_prepared_as_clip_does(tiny_clip):
    image = draw(np.random.default_rng(0), "a", (80, 80), True)[0]
    theirs = open_clip.image_transform(64, is_train=False)(image)
    torch.testing.assert_close(tiny_clip.preprocess(image), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, weights, quick", [
    ("ViT-L-14-336", "openai", True), ("ViT-B-32", "openai", True),
    ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-32-quickgelu", "laion400m_e32", True),
    ("ViT-L-14-336", "file.pt", True), ("ViT-B-32", "file.pt", False), ("tiny", "file.pt", False)])
def test_cnc_quick_gelu_is_known_of_the_weights(name, weights, quick):
    assert cnc.quick_gelu(name, weights) == quick


@pytest.mark.parametrize("name, quick", [
    ("ViT-L-14-336", True), ("ViT-B-32", False), ("ViT-B-32-quickgelu", True)])
def test_cnc_quick_gelu_is_in_both_towers(name, quick, on_meta):
    clip = cnc.Teacher(cnc.Config(teacher=name, weights="none")).clip
    for tower in (clip.visual.transformer, clip.transformer):
        kinds = {type(block.mlp.gelu).__name__ for block in tower.resblocks}
        assert kinds == {"QuickGELU" if quick else "GELU"}


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (2, 3, 72, 72), (2, 3, 96, 96), (2, 1, 64, 64),
                                   (3, 64, 64)], ids=str)
def test_cnc_images_of_another_shape_are_refused(shape, tiny_clip):
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\)"):
        tiny_clip(torch.randn(shape))


def test_cnc_teacher_depends_on_its_seed_alone():
    first = cnc.Teacher(cnc.Config(**CNC_TINY)).identity()
    torch.rand(5)
    again, other = (cnc.Teacher(cnc.Config(**CNC_TINY, seed=s)).identity() for s in (0, 1))
    assert first == again != other


def test_cnc_random_teacher_is_whitened_by_the_training_images():
    teacher, images = cnc.Teacher(cnc.Config(**CNC_TINY)), random_images(24).cumsum(2)

    def statistics():
        """Of all tokens, tap by tap: length of the mean, share of the largest direction."""
        tokens = torch.stack(teacher(images)).flatten(1, 2).double()
        spread = torch.linalg.svdvals(tokens - tokens.mean(1, keepdim=True)).square()
        return tokens.mean(1).norm(dim=1), spread[:, 0] / spread.sum(1)

    _, share = statistics()
    teacher.estimate_statistics(images.split(5))
    identity, (mean, share_after) = teacher.identity(), statistics()
    assert mean.max() < 0.05 and (share_after < share / 2).all()
    assert teacher.identity() == identity  # frozen again


@pytest.mark.parametrize("warm_up", [True, False])
def test_cnc_teacher_and_text_tower_never_change(warm_up, tokens):
    detector = cnc_detector(tau=1.0).train()
    before = detector.teacher.identity()
    assert any("visual" in key for key in detector.teacher.state_dict())
    assert any("token_embedding" in key for key in detector.teacher.state_dict())
    optimizer = torch.optim.Adam((p for p in detector.parameters() if p.requires_grad), 0.1)
    for _ in range(3):
        detector(tokens, warm_up).backward()
        optimizer.step()
    assert detector.teacher.identity() == before
    assert not any(m.training for m in detector.teacher.modules()) and detector.student.training
    assert not any(p.requires_grad or p.grad is not None for p in detector.teacher.parameters())


# ---- CNC: prompts --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny", "ViT-B-32"])
def test_cnc_prompts_equal_encode_text(name):
    """The embeddings of real words for contexts, in another order in each prompt."""
    teacher = cnc.Teacher(cnc.Config(teacher=name, weights="none"))
    learner, embedding = cnc.PromptLearner(teacher), teacher.clip.token_embedding
    words = "a photo of the red metal part on one old table and".split()
    assert (teacher.tokenizer(words)[:, 2] == teacher.tokenizer.eot_token_id).all()  # a token each
    assert learner.ctx.shape == (3, 2, len(words), embedding.embedding_dim)
    ids = torch.stack([teacher.tokenizer([
        " ".join([*words[k:], *words[:k], learner.SENTENCES[row]])
        for row, k in enumerate((tap, 11 - tap))]) for tap in range(3)])
    with torch.no_grad():
        learner.ctx.copy_(embedding(ids[:, :, 1:1 + len(words)]))
        expected = [F.normalize(teacher.clip.encode_text(pair), dim=-1) for pair in ids]
        torch.testing.assert_close(learner(), torch.stack(expected), rtol=0, atol=1e-5)


def test_cnc_shared_prompts_start_as_words_and_differ_in_one(tiny_clip):
    learner, clip = cnc.PromptLearner(tiny_clip, shared=True), tiny_clip.clip
    said = tiny_clip.tokenizer([f"{learner.WORDS} {end}" for end in learner.SENTENCES])
    expected = F.normalize(clip.encode_text(said), dim=-1).expand(3, -1, -1)
    torch.testing.assert_close(learner(), expected, rtol=0, atol=1e-5)
    learner().square()[:, 0, 0].sum().backward()  # learn from one sentence: the other moves, too
    assert learner.ctx.shape == learner.ctx.grad.shape == (3, 1, 4, 128)
    assert learner.ctx.grad.flatten(3).any(-1).all()


def test_cnc_prompts_are_unit_vectors_and_only_their_contexts_learn(tiny_clip):
    learner = cnc.PromptLearner(tiny_clip)
    text = learner()
    assert text.shape == (3, 2, tiny_clip.clip.visual.proj.shape[1]) and text.dtype == torch.float32
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3, 2))
    (text * torch.randn_like(text)).sum().backward()
    assert list(learner.state_dict()) == [name for name, _ in learner.named_parameters()] == ["ctx"]
    assert learner.ctx.grad.flatten(3).any(-1).all()  # every word of every prompt
    assert all(p.grad is None for p in tiny_clip.parameters())


def test_cnc_is_not_told_the_class():
    assert list(inspect.signature(cnc.CNC.forward).parameters) == ["self", "features", "warm_up"]
    assert list(inspect.signature(cnc.CNC.describe).parameters) == ["self", "features"]
    assert list(inspect.signature(cnc.PromptLearner.forward).parameters) == ["self"]


# ---- CNC: mixture of experts ---------------------------------------------------------------------
def routed_to(*logits: float) -> cnc.GatedMoE:
    """A mixture of as many experts that sends every token the same way; top_k = 2."""
    torch.manual_seed(0)
    moe = cnc.GatedMoE(8, len(logits), 2)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor(logits))
    return moe


@pytest.mark.parametrize("experts, top_k", [(5, 2), (5, 1), (5, 5), (3, 2), (1, 1)])
def test_cnc_mixture_equals_the_dense_sum_over_all_experts(experts, top_k):
    torch.manual_seed(0)
    moe, x = cnc.GatedMoE(8, experts, top_k), torch.randn(2, 30, 8)
    logits = moe.gate(x)
    unchosen = logits < logits.topk(top_k).values[..., -1:]
    weights = logits.masked_fill(unchosen, -math.inf).softmax(-1)
    dense = sum(weights[..., k, None] * moe.experts[k](x) for k in range(experts))
    torch.testing.assert_close(moe(x)[0], dense, rtol=0, atol=1e-6)


def test_cnc_only_the_chosen_experts_are_computed():
    torch.manual_seed(0)
    moe, rows = cnc.GatedMoE(8, 5, 2), []
    for one in moe.experts:
        one.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    moe(torch.randn(2, 30, 8))
    assert sum(rows) == 2 * 60


def test_cnc_gradients_reach_the_gate_and_the_chosen_experts_only():
    moe = routed_to(0, 3, 0, 4, 0)
    y, _ = moe(torch.randn(2, 30, 8))
    y.square().sum().backward()
    reached = [any(p.grad is not None and p.grad.any() for p in e.parameters())
               for e in moe.experts]
    assert reached == [False, True, False, True, False]
    assert moe.gate.weight.grad.any(1).tolist() == reached
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


def test_cnc_balance_loss_is_zero_when_all_experts_are_used_alike():
    x, losses = torch.randn(2, 30, 8), []
    for favour in (0, 1, 3, 30):
        y, balance = routed_to(favour, 0, 0, 0, 0)(x)
        assert y.shape == x.shape and y.isfinite().all() and balance.ndim == 0
        losses.append(balance.item())
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses)
    assert losses[-1] > 1


def test_cnc_balance_loss_evens_the_gate():
    moe = routed_to(3, 1, 0, 0, 0)
    moe(torch.randn(2, 30, 8))[1].backward()
    assert moe.gate.bias.grad[0] > 0 > moe.gate.bias.grad[2]  # descent lowers the favourite


# ---- CNC: promotion, constraint, loss, map -------------------------------------------------------
def cosine_distance(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1)


def test_cnc_promotion_moves_an_abnormal_patch_and_no_normal_one():
    """Both branches show the same thing; the abnormal patch is encoded with a touch of t_a and
    decoded, as the decoder knows only normal ones, with a touch of t_n."""
    content, t_n, t_a, noise = torch.eye(64)[:4]
    normal, abnormal = (F.normalize(content + 0.5 * t, dim=0) for t in (t_n, t_a))
    decoded = F.normalize(normal + 0.05 * noise, dim=0)
    moved, stayed = (cosine_distance(cnc.promote(e, t_n, t_a), cnc.promote(decoded, t_n, t_a))
                     - cosine_distance(e, decoded) for e in (abnormal, normal))
    assert moved > 0.03 and stayed.abs() < 0.002


def test_cnc_promotion_adds_between_none_and_all_of_t_n():
    torch.manual_seed(0)
    t_n, t_a, *v = F.normalize(torch.randn(200, 64), dim=-1)
    v = torch.stack([*v, t_n, -t_n, t_a, -t_a, F.normalize(t_n - t_a, dim=0)])
    added = cnc.promote(v, t_n, t_a) - v
    psi = added @ t_n
    torch.testing.assert_close(added, psi[:, None] * t_n, rtol=0, atol=1e-6)  # no other direction
    assert psi.min() > 0 and psi.max() < 1
    order = (v @ (t_n - t_a)).argsort()
    assert (psi[order].diff() > -1e-6).all()  # the more normal, the more


@pytest.mark.parametrize("tau", [0.001, 0.07, 1.0])
def test_cnc_constraint_is_a_softmax_at_tau(tau, tokens):
    detector = cnc_detector(tau=tau)
    encoded, text = [t.float() for t in tokens], detector.prompts().detach()
    terms = []
    for tap in range(3):
        for image in range(3):
            v = detector.teacher.joint(encoded[tap][image, 0]).double()
            normal, abnormal = (v @ text[tap].T.double() / tau).tolist()
            terms.append(np.logaddexp(normal, abnormal) - normal)
    assert detector.constraint(encoded, text).item() == pytest.approx(np.mean(terms), rel=2e-3)


def touched(module) -> bool:
    return any(p.grad is not None and p.grad.any().item() for p in module.parameters())


def test_cnc_constraint_teaches_first_the_prompts_then_the_decoder(tokens):
    detector = cnc_detector(tau=1.0)
    encoded, decoded, _ = detector.decode(tokens)
    detector.constraint(encoded, detector.prompts()).backward()
    assert touched(detector.prompts) and not touched(detector.student)
    detector.zero_grad()
    detector.constraint(decoded, detector.prompts().detach()).backward()
    assert touched(detector.student) and not touched(detector.prompts)


def gradients(detector, features, warm_up: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the whole loss: the student's in one vector, the prompts' (None where there is none)."""
    detector.zero_grad(set_to_none=True)
    detector(features, warm_up).backward()
    found = [p.grad for p in detector.student.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in found]), detector.prompts.ctx.grad


def no_constraint(self, tokens, text):
    return torch.zeros(())


def test_cnc_loss_guides_the_decoder_only_after_the_warm_up(tokens, monkeypatch):
    """Nor do the prompts learn from anything but the constraint."""
    detector = cnc_detector(tau=1.0)
    (early, ctx), (late, later) = (gradients(detector, tokens, w) for w in (True, False))
    monkeypatch.setattr(cnc.CNC, "constraint", no_constraint)
    (free_early, none), (free_late, _) = (gradients(detector, tokens, w) for w in (True, False))
    assert ctx.any() and later is None and none is None
    assert torch.equal(early, free_early) and (late - free_late).norm() > 1e-3 * late.norm()


def test_cnc_loss_uses_the_prompts_that_the_warm_up_left(tokens):
    """A step of warm-up, then a loss: not one with the prompts of before."""
    detector = cnc_detector(tau=1.0)
    before = detector(tokens).item()
    detector(tokens, warm_up=True)
    with torch.no_grad():
        detector.prompts.ctx.normal_()
    assert detector(tokens).item() != pytest.approx(before, abs=1e-6)


def test_cnc_without_its_parts_is_plain_reverse_distillation(tokens):
    detector = cnc_detector(no_moe=True, no_fnp=True, no_constraint=True)
    encoded, decoded, _ = detector.decode(tokens)
    expected = torch.stack([cosine_distance(detector.teacher.joint(e), detector.teacher.joint(d))
                            for e, d in zip(encoded, decoded)])[..., 1:].mean().item()
    for warm_up in (True, False):
        assert detector(tokens, warm_up).item() == pytest.approx(expected, abs=1e-6)
        assert gradients(detector, tokens, warm_up)[1] is None


def test_cnc_no_moe_puts_one_expert_in_place_of_the_mixture():
    full, one = cnc_detector().student, cnc_detector(no_moe=True).student
    shapes, kept = ({k: v.shape for k, v in s.state_dict().items() if not k.startswith("moe.")}
                    for s in (full, one))
    assert shapes == kept
    assert ([p.shape for p in one.moe.parameters()]
            == [p.shape for p in full.moe.experts[0].parameters()])


def test_cnc_no_fnp_removes_the_promotion_and_nothing_else(tokens, monkeypatch):
    full, without = cnc_detector(), cnc_detector(no_fnp=True)
    assert not torch.allclose(full.describe(tokens)[1], without.describe(tokens)[1], atol=1e-3)
    monkeypatch.setattr(cnc, "promote", lambda v, *text: v)
    assert torch.equal(full.describe(tokens)[1], without.describe(tokens)[1])
    for warm_up in (True, False):
        assert torch.equal(full(tokens, warm_up), without(tokens, warm_up))


def test_cnc_no_constraint_removes_the_guidance_and_nothing_else(tokens, monkeypatch):
    full, without = cnc_detector(), cnc_detector(no_constraint=True)
    assert torch.equal(full.describe(tokens)[1], without.describe(tokens)[1])
    assert torch.equal(full(tokens, warm_up=True), without(tokens, warm_up=True))
    assert not torch.allclose(full(tokens), without(tokens))
    monkeypatch.setattr(cnc.CNC, "constraint", no_constraint)
    assert torch.equal(full(tokens), without(tokens))


def test_cnc_decoder_runs_from_deep_to_shallow(tokens):
    detector, seen = cnc_detector(), []
    for block in detector.student.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    decoded = detector.decode(tokens)[1]
    assert len(seen) == 3 and all(map(torch.equal, decoded, reversed(seen)))


def test_cnc_map_is_in_range_and_of_its_image_alone(tokens):
    detector = cnc_detector()
    with torch.no_grad():
        pooled, maps = detector.describe(tokens)
        single = [detector.describe([t[i:i + 1] for t in tokens]) for i in range(3)]
    assert pooled.ndim == 2 and len(pooled) == 3 and maps.shape == (3, 64, 64)
    assert maps.min() >= 0 and maps.max() <= 2 and maps.std() > 0
    torch.testing.assert_close(torch.cat([p for p, _ in single]), pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([m for _, m in single]), maps, rtol=0, atol=1e-5)


def test_cnc_map_shows_where_the_decoder_fails(tokens):
    """All patches reproduced but one, the second of its row."""
    detector = cnc_detector(no_fnp=True)
    grid, patch = detector.teacher.grid, 64 // detector.teacher.grid
    row, column = grid // 2, 1

    def fail_at_one_patch(encoded):
        decoded = [e.clone() for e in encoded]
        for d in decoded:
            d[:, 1 + grid * row + column] *= -1
        return decoded, torch.zeros(())

    detector.student.forward = fail_at_one_patch
    maps = detector.describe(tokens)[1]
    y, x = (patch * k + patch // 2 for k in (row, column))  # four pixels share the centre
    torch.testing.assert_close(maps[:, y - 1:y + 1, x - 1:x + 1],
                               maps.amax((1, 2))[:, None, None].expand(3, 2, 2))
    assert maps.amax((1, 2)).min() > 0.3 and maps[:, :y - patch].abs().max() < 1e-4


def test_cnc_bfloat16_student_is_close_to_float32(tokens, monkeypatch):
    detector = cnc_detector()
    with torch.no_grad():
        exact, exact_loss = detector.describe(tokens)[1], detector(tokens)
        monkeypatch.setattr(cnc, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
        maps, loss = detector.describe(tokens)[1], detector(tokens)
    assert maps.dtype == loss.dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    torch.testing.assert_close(maps, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(loss, exact_loss, rtol=0.02, atol=0.02)


# ---- metrics -------------------------------------------------------------------------------------
def f1_max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return (2 * precision * recall / (precision + recall).clip(1e-12)).max()


def brute_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """The definition word for word: every distinct threshold, every region."""
    regions = []  # (image, (H, W) bool)
    for i, mask in enumerate(masks):
        labelled, n = ndimage.label(mask, np.ones((3, 3)))
        regions += [(i, labelled == k) for k in range(1, n + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        flagged = maps >= threshold
        fpr.append(flagged[~masks].mean())
        pro.append(np.mean([flagged[i][region].mean() for i, region in regions]))
    inside = [(x, y) for x, y in zip(fpr, pro) if x <= 0.3] + [(0.3, np.interp(0.3, fpr, pro))]
    return np.trapezoid([y for _, y in inside], [x for x, _ in inside]) / 0.3


def pixel_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(name))
    maps, masks = rng.normal(size=(5, 12, 12)), np.zeros((5, 12, 12), bool)
    masks[0, 2:6, 3:9] = True
    if name != "one region":  # regions of different areas, some diagonal; image 4 stays good
        masks[1, [0, 1, 2], [0, 1, 2]] = True
        masks[1, 8:, 9:] = True
        masks[2:4] = rng.random((2, 12, 12)) < 0.1
    maps += 1.5 * masks
    return (maps.round(0) if name == "ties" else maps), masks


@pytest.mark.parametrize("name", ["one region", "many regions", "ties"])
def test_pixel_metrics_follow_their_definitions(name):
    maps, masks = pixel_case(name)
    found = cada.pixel_metrics(torch.tensor(maps), torch.tensor(masks))
    flat = masks.ravel(), maps.ravel()
    assert found == pytest.approx({
        "P-AUROC": roc_auc_score(*flat), "P-AP": average_precision_score(*flat),
        "P-F1max": f1_max(*flat), "AUPRO": brute_aupro(maps, masks)}, abs=1e-6)


def test_regions_are_joined_by_a_corner():
    """Half of a diagonal pair found, a lone pixel not: overlap 1/4, then on a line to (1, 1)."""
    masks, maps = torch.zeros(1, 20, 20, dtype=torch.bool), torch.zeros(1, 20, 20)
    masks[0, [3, 4, 10], [3, 4, 10]] = True
    maps[0, 3, 3] = 1
    at_03 = 0.25 + 0.3 * 0.75
    assert cada.pixel_metrics(maps, masks)["AUPRO"] == pytest.approx((0.25 + at_03) / 2)


def test_a_perfect_map_has_perfect_metrics():
    masks = torch.tensor(pixel_case("many regions")[1])
    assert cada.pixel_metrics(masks.float(), masks) == pytest.approx(
        {"P-AUROC": 1, "P-AP": 1, "P-F1max": 1, "AUPRO": 1})


@pytest.mark.parametrize("digits", [1, 12])  # 1: many ties
def test_image_metrics_equal_scikit_learn(digits):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = (rng.random(60) + 0.3 * labels).round(digits)
    assert cada.image_metrics(scores, labels) == pytest.approx({
        "I-AUROC": roc_auc_score(labels, scores), "I-AP": average_precision_score(labels, scores),
        "I-F1max": f1_max(labels, scores)}, abs=1e-9)


def test_a_class_of_good_images_has_no_metrics_and_does_not_count():
    maps, masks = (torch.tensor(x) for x in pixel_case("many regions"))
    maps, masks = maps.repeat(2, 1, 1), torch.cat([masks, torch.zeros_like(masks)])
    labels, classes = np.array([1, 1, 1, 1, 0] + [0] * 5), np.array(["a"] * 5 + ["b"] * 5)
    found = cada.summarise(maps.amax((1, 2)).numpy(), labels, classes, maps, masks)
    assert all(math.isnan(v) for v in found["per_class"]["b"].values())
    assert found["class_mean"] == found["per_class"]["a"]
    assert not any(math.isnan(v) for v in found["pooled"].values())
    assert "NaN" not in json.dumps(cada.without_nan(found))


PEAK = """
import cada, numpy as np, sys, torch
def of_process(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
n = int(sys.argv[1])
masks = torch.zeros(n, 256, 256, dtype=torch.bool)
masks[::2, 100:140, 90:150] = True
maps = torch.rand(n, 256, 256)
before = of_process("VmRSS")
cada.pixel_metrics(maps, masks)
print((of_process("VmHWM") - before) / maps.numel())
"""


def bytes_a_pixel(images: int) -> float:
    """Peak memory of the pixel metrics over that of their arguments, images of 256 x 256."""
    return float(shell("-c", PEAK, images, cwd=HERE).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_13_million_pixels_take_13_bytes_each():
    assert bytes_a_pixel(200) < 13


# ---- cache and checkpoint ------------------------------------------------------------------------
EXACT = "raw", "cada", "oracle", "u", "gamma"


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_cache_changes_no_score_and_leaves_nothing(cache, data, trained, tmp_path):
    """Also: one seed gives one result, the run compared with being another process."""
    assert run("--data", data, "--out", tmp_path / "out", *FLAGS, "--cache", cache) == 0
    np.testing.assert_array_equal(numbers(tmp_path / "out", *EXACT), numbers(trained.out, *EXACT))
    assert {p.name for p in listing(tmp_path / "out")} == {p.name for p in trained.files}


def test_the_seed_alone_decides_the_batches():
    batches = cada.shuffled(12, 4, 6, seed=0)
    assert np.shape(batches) == (6, 4)
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == list(range(12))
    assert cada.shuffled(12, 4, 6, seed=0) == batches != cada.shuffled(12, 4, 6, seed=1)


def test_renaming_the_classes_changes_no_score(tree, trained, tmp_path):
    (tree / "a").rename(tree / "screws")
    (tree / "b").rename(tree / "washers")
    assert run("--data", tree, "--out", tmp_path / "out", *FLAGS) == 0
    assert {row["class"] for row in rows_of(tmp_path / "out")} == {"screws", "washers"}
    np.testing.assert_array_equal(numbers(tmp_path / "out", *EXACT), numbers(trained.out, *EXACT))


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(data, trained, tmp_path, monkeypatch,
                                                          capsys, fails):
    """Killed runs: see hardening."""
    out, save = tmp_path / "stopped", cada.save_checkpoint

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(cada, "save_checkpoint", save_and_stop)
        assert run("--data", data, "--out", out, *FLAGS, "--cache", "disk") == 130
    assert {p.name for p in listing(out)} == {"checkpoint.pt"}  # and no cache
    capsys.readouterr()
    fails("eval", "--checkpoint", out / "checkpoint.pt", says=["step 2", "--resume"])
    assert run("--resume", "--data", f"{data}/", "--out", out) == 0  # the slash is no other set
    assert results(out) == results(trained.out)
    np.testing.assert_array_equal(numbers(out, *EXACT), numbers(trained.out, *EXACT))


def test_checkpoint_is_plain_and_complete(trained):
    content = torch.load(trained.checkpoint, weights_only=True)
    assert content["config"]["image_size"] == 64 and content["step"] == 4
    assert content["optimizer"]["state"] and content["schedule"]["last_epoch"] == 4
    assert content["random"]["cpu"].dtype == torch.uint8 and content["cada"]
    told = json.loads((trained.out / "metrics.json").read_text())
    assert content["cada"]["threshold"] == told["threshold"] and content["detector"] == "revdist"
    teacher = cada.Teacher("resnet18", "none", 0)
    teacher.load_state_dict(content["teacher"]["state"])
    assert teacher.identity() == content["teacher"]["identity"]


@pytest.fixture(scope="module")
def weights_files(session_path) -> list[Path]:
    """Two ResNet-18 weight files with different weights."""
    files = [session_path / f"resnet18-{seed}.pth" for seed in (0, 1)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18().state_dict(), file)
    return files


def test_a_teacher_from_a_file_stays_and_no_other_will_do(data, weights_files, tmp_path, fails):
    out = tmp_path / "trained"
    one_step = [*FLAGS, "--weights", weights_files[0], "--iters", 1]
    assert run("--data", data, "--out", out, *one_step) == 0
    teacher = torch.load(out / "checkpoint.pt", weights_only=True)["teacher"]
    assert teacher["state"] is None
    assert teacher["identity"] == cada.Teacher("resnet18", str(weights_files[0]), 5).identity()
    fails("eval", "--checkpoint", out / "checkpoint.pt", "--weights", weights_files[1],
          says=["another teacher", "--weights"])


# ---- the script as a user runs it ----------------------------------------------------------------
def test_train_writes_and_prints_what_it_says(trained):
    names = {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png", "distributions.png"}
    assert {p.name for p in trained.files} == names
    metrics = json.loads((trained.out / "metrics.json").read_text())
    assert set(metrics) == {"script", "detector", "config", "versions", "seconds", "threshold",
                            "results"}
    assert set(metrics["results"]) == {"raw", "cada", "oracle"}
    for variant in metrics["results"].values():
        assert set(variant) == {"pooled", "class_mean", "per_class"}
        assert set(variant["per_class"]) == {"a", "b"}
        assert set(variant["pooled"]) == {"I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP",
                                          "P-F1max", "AUPRO"}
    for words in ("class mean", "pooled", "oracle", "AUPRO", "threshold"):
        assert words in trained.stdout
    assert "RANDOM" in trained.stderr and "\r" not in trained.stderr  # no progress bar in a pipe


def test_scores_and_metrics_tell_the_same(trained):
    labels = numbers(trained.out, "label")[:, 0]
    classes = np.array([row["class"] for row in rows_of(trained.out)])
    for variant in ("raw", "cada", "oracle"):
        scores, told = numbers(trained.out, variant)[:, 0], results(trained.out)[variant]
        assert told["pooled"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        assert told["class_mean"]["I-AUROC"] == pytest.approx(auroc(scores, labels, classes))


def test_train_eval_predict_from_the_shell(data, trained, tmp_path):
    words = "--checkpoint", trained.checkpoint, "--out", tmp_path / "out"
    done = shell("cada.py", "eval", *words, cwd=HERE)
    assert done.returncode == 0, done.stderr
    told, as_trained = ([line for line in text.splitlines() if not line.startswith("wrote")]
                        for text in (done.stdout, trained.stdout))
    assert told == as_trained
    assert not (tmp_path / "out/checkpoint.pt").exists()
    assert results(tmp_path / "out") == results(trained.out)

    paths = data / "b/test", data / "a/test/hole/001.png"
    done = shell("cada.py", "predict", *paths, *words, cwd=HERE)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    scored = {row["path"]: row for row in rows_of(trained.out)}
    assert len(told) == 7 and len({row["overlay"] for row in told}) == 7
    for row in told:
        assert row.keys() >= {"path", "score", "threshold", "anomalous", "u", "gamma"}
        expected = scored[row["path"]]
        for here, there in (("score", "cada"), ("u", "u"), ("gamma", "gamma")):
            assert row[here] == pytest.approx(float(expected[there]), abs=1e-4)
        assert row["anomalous"] == (row["score"] > row["threshold"])
        assert Image.open(row["overlay"]).size == Image.open(row["path"]).size


def test_predict_needs_no_data_set_and_takes_any_image(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cada, "read_dataset", None)
    for i, name in enumerate(("grey 16 bit png", "rgba", "cmyk jpeg")):
        image, suffix, _ = image_modes()[name]
        save(image, tmp_path / "images" / f"deep/{i}{suffix}")
    assert run("predict", tmp_path / "images", "--checkpoint", trained.checkpoint,
               "--out", tmp_path / "out") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["path"]).name for row in told] == ["0.png", "1.png", "2.JPG"]
    assert all(Image.open(row["overlay"]).size == (50, 40) for row in told)


def test_scores_do_not_depend_on_the_batch_size(trained, tmp_path):
    words = "--checkpoint", trained.checkpoint, "--out", tmp_path
    assert run("eval", *words, "--batch-size", 5) == 0
    np.testing.assert_allclose(numbers(tmp_path, *EXACT), numbers(trained.out, *EXACT), atol=1e-4)


def test_a_visa_tree_is_evaluated(visa, trained, tmp_path, capsys):
    """Classes that the training set did not have: there is no oracle for them."""
    words = "--checkpoint", trained.checkpoint, "--out", tmp_path / "out"
    assert run("eval", *words, "--data", visa, "--workers", 1) == 0
    assert [row["label"] for row in rows_of(tmp_path / "out")] == ["0", "0", "1", "1", "1"] * 2
    found = results(tmp_path / "out")
    assert set(found) == {"raw", "cada"} and found["cada"]["pooled"]["AUPRO"] is not None
    assert "candle" in capsys.readouterr().out


def test_without_masks_there_are_image_metrics_only(tree, trained, tmp_path, capsys):
    for cls in "ab":
        shutil.rmtree(tree / cls / "ground_truth")
    words = "--checkpoint", trained.checkpoint, "--out", tmp_path / "out"
    assert run("eval", *words, "--data", tree) == 0
    found, expected = (results(out)["cada"]["pooled"] for out in (tmp_path / "out", trained.out))
    assert found == {k: v for k, v in expected.items() if k.startswith("I-")}
    assert "no masks" in capsys.readouterr().out


def test_an_overlay_has_one_fixed_scale(tmp_path):
    image = Image.fromarray(COLOURS)
    for name, value in (("cold", 0.0), ("warm", 0.5), ("hot", 1.0)):
        cada.write_overlay(tmp_path / f"{name}.png", image, torch.full((8, 8), value), full=1.0)
    cold, warm, hot = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
                       for name in ("cold", "warm", "hot"))
    np.testing.assert_array_equal(cold, COLOURS)  # per-image scaling would give three equal ones
    assert 0 < np.abs(warm - COLOURS).mean() < np.abs(hot - COLOURS).mean()


@pytest.mark.parametrize("script, more", [
    (cada, "iters"), (cnc, "epochs taps experts top-k theta tau no-moe no-fnp no-constraint")],
    ids=["cada", "cnc"])
def test_help_names_every_flag(script, more, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help", script=script)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("data out seed device teacher weights image-size batch-size lr quantile cache "
                 f"checkpoint resume workers {more}").split():
        assert f"--{flag} " in text


# ---- CNC: the script as a user runs it -----------------------------------------------------------
def test_cnc_defaults_are_published_ones_but_small_on_the_demo_set(data, visa):
    real, _ = cnc.configure({"data": str(data)})
    assert (real.teacher, real.weights, real.batch_size) == ("ViT-L-14-336", "openai", 8)
    assert (real.epochs, real.lr, real.tau) == (250, 1e-3, 0.001)
    assert (real.experts, real.top_k, real.theta) == (5, 2, 5)
    assert not (real.no_moe or real.no_fnp or real.no_constraint)
    assert cnc.configure({"data": str(visa)})[0].epochs == 200
    demo, _ = cnc.configure({"data": str(DEMO), "batch_size": 7})
    assert (demo.teacher, demo.weights, demo.batch_size) == ("tiny", "none", 7)
    assert demo.epochs < 250


def test_cnc_train_writes_and_prints_what_it_says(cnc_trained):
    names = {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png", "distributions.png",
             "experts.png", "text.png"}
    assert {p.name for p in cnc_trained.files} == names
    metrics = json.loads((cnc_trained.out / "metrics.json").read_text())
    assert set(metrics) == {"script", "config", "versions", "seconds", "threshold", "results"}
    assert metrics["script"] == "cnc" and set(metrics["results"]) == {"cnc"}
    found = metrics["results"]["cnc"]
    assert set(found) == {"pooled", "class_mean", "per_class"}
    assert set(found["per_class"]) == {"a", "b"}
    for words in ("class mean", "pooled", "AUPRO", "threshold", *(names - {"checkpoint.pt"})):
        assert words in cnc_trained.stdout
    assert "RANDOM" in cnc_trained.stderr and "\r" not in cnc_trained.stderr
    for name in names:
        if name.endswith(".png"):
            assert np.asarray(Image.open(cnc_trained.out / name).convert("L")).std() > 5


def test_cnc_eval_repeats_the_numbers(cnc_trained, tmp_path, capsys):
    assert run("eval", "--checkpoint", cnc_trained.checkpoint, "--out", tmp_path, script=cnc) == 0
    told, as_trained = ([line for line in text.splitlines() if not line.startswith("wrote")]
                        for text in (capsys.readouterr().out, cnc_trained.stdout))
    assert told == as_trained and results(tmp_path) == results(cnc_trained.out)
    assert rows_of(tmp_path) == rows_of(cnc_trained.out)
    assert {p.name for p in listing(tmp_path)} == {p.name for p in cnc_trained.files
                                                   } - {"checkpoint.pt"}


def test_cnc_predict_gives_the_scores_of_eval(data, cnc_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cnc, "read_dataset", None)  # needs none
    paths = data / "b/test", data / "a/test/hole/001.png"
    assert run("predict", *paths, "--checkpoint", cnc_trained.checkpoint, "--out", tmp_path,
               "--batch-size", 3, script=cnc) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = {row["path"]: row for row in rows_of(cnc_trained.out)}
    assert len(told) == 7 and len({row["overlay"] for row in told}) == 7
    for row in told:
        assert set(row) == {"path", "score", "threshold", "anomalous", "overlay"}
        assert row["score"] == pytest.approx(float(scored[row["path"]]["score"]), abs=1e-4)
        assert str(row["anomalous"]) == scored[row["path"]]["anomalous"]
        assert Image.open(row["overlay"]).size == Image.open(row["path"]).size


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_cnc_cache_changes_no_score_and_leaves_nothing(cache, data, cnc_trained, tmp_path):
    """Also: one seed gives one result, the run compared with being another process."""
    assert run("--data", data, "--out", tmp_path, *CNC_FLAGS, "--cache", cache, script=cnc) == 0
    assert rows_of(tmp_path) == rows_of(cnc_trained.out)
    assert {p.name for p in listing(tmp_path)} == {p.name for p in cnc_trained.files}


def test_cnc_renaming_the_classes_changes_no_score(tree, cnc_trained, tmp_path):
    (tree / "a").rename(tree / "screws")
    (tree / "b").rename(tree / "washers")
    assert run("--data", tree, "--out", tmp_path / "out", *CNC_FLAGS, script=cnc) == 0
    assert {row["class"] for row in rows_of(tmp_path / "out")} == {"screws", "washers"}
    scores, expected = (numbers(out, "score") for out in (tmp_path / "out", cnc_trained.out))
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("step", [2, 4], ids=["in the warm-up", "after it"])
def test_cnc_a_killed_run_goes_on_as_if_nothing_had_happened(step, data, cnc_trained, tmp_path,
                                                             monkeypatch, capsys, fails):
    save, out = cnc.save_checkpoint, tmp_path / "killed"

    def save_and_die(path, content):
        save(path, content)
        if content["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cnc, "save_checkpoint", save_and_die)
        assert run("--data", data, "--out", out, *CNC_FLAGS, script=cnc) == 130
    assert {p.name for p in listing(out)} == {"checkpoint.pt"}  # and no cache
    assert "--resume" in capsys.readouterr().err
    fails("eval", "--checkpoint", out / "checkpoint.pt", says=[f"step {step} of 6", "--resume"],
          script=cnc)
    assert run("--resume", "--out", out, script=cnc) == 0
    assert results(out) == results(cnc_trained.out) and rows_of(out) == rows_of(cnc_trained.out)


def test_cnc_warm_up_lasts_theta_epochs(data, tmp_path, monkeypatch):
    """Three steps an epoch."""
    phases, loss = [], cnc.CNC.forward

    def watched(self, features, warm_up=False):
        phases.append(warm_up)
        return loss(self, features, warm_up)

    monkeypatch.setattr(cnc.CNC, "forward", watched)
    monkeypatch.setattr(cnc, "evaluate", lambda *args: None)
    for theta, steps in ((0, 0), (1, 3)):
        phases.clear()
        words = "--data", data, "--out", tmp_path, *CNC_FLAGS, "--theta", theta
        assert run(*words, script=cnc) == 0
        assert phases == [True] * steps + [False] * (6 - steps)


def same_clip(one: cnc.Teacher, other: cnc.Teacher) -> bool:
    first, second = (teacher.clip.state_dict() for teacher in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_cnc_checkpoint_is_plain_and_complete(cnc_trained):
    content = torch.load(cnc_trained.checkpoint, weights_only=True)
    assert content["config"]["image_size"] == 64 and content["step"] == content["steps"] == 6
    assert content["optimizer"]["state"] and content["random"]["cpu"].dtype == torch.uint8
    assert content["threshold"] == json.loads(
        (cnc_trained.out / "metrics.json").read_text())["threshold"]
    detector = cnc_detector(seed=1)
    for part in ("student", "prompts"):
        getattr(detector, part).load_state_dict(content[part])
    detector.teacher.load_state_dict(content["teacher"]["state"])
    assert detector.teacher.identity() == content["teacher"]["identity"]
    assert same_clip(detector.teacher, cnc.Teacher(cnc.Config(**CNC_TINY)))  # as before training


def test_cnc_a_teacher_from_a_file_stays_and_no_other_will_do(data, clip_files, tmp_path, fails):
    out, flags = tmp_path / "trained", [*CNC_FLAGS, "--epochs", 1, "--weights", clip_files[0]]
    assert run("--data", data, "--out", out, *flags, script=cnc) == 0
    teacher = torch.load(out / "checkpoint.pt", weights_only=True)["teacher"]
    from_file = cnc.Teacher(cnc.Config(**CNC_TINY | {"weights": str(clip_files[0])}, seed=5))
    assert teacher["state"] is None and teacher["identity"] == from_file.identity()
    assert same_clip(from_file, cnc.Teacher(cnc.Config(**CNC_TINY)))  # whose weights the file has
    fails("eval", "--checkpoint", out / "checkpoint.pt", "--weights", clip_files[1],
          says=["another teacher", "--weights"], script=cnc)


def test_cnc_plain_reverse_distillation_from_train_to_eval(data, tmp_path):
    """No experts and no text, so no figures of them."""
    flags = [*CNC_FLAGS, "--no-moe", "--no-fnp", "--no-constraint"]
    assert run("--data", data, "--out", tmp_path / "out", *flags, script=cnc) == 0
    names = {p.name for p in listing(tmp_path / "out")}
    assert names == {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png",
                     "distributions.png"}
    assert run("eval", "--checkpoint", tmp_path / "out/checkpoint.pt", "--out", tmp_path / "again",
               script=cnc) == 0
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


def test_cnc_other_taps_experts_and_prompts_from_train_to_eval(data, tmp_path):
    flags = [*CNC_FLAGS, "--taps", "1,3", "--experts", 9, "--top-k", 3, "--shared-prompts"]
    assert run("--data", data, "--out", tmp_path / "out", *flags, script=cnc) == 0
    content = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert content["prompts"]["ctx"].shape == (2, 1, 4, 128)
    assert run("eval", "--checkpoint", tmp_path / "out/checkpoint.pt", "--out", tmp_path / "again",
               script=cnc) == 0
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


def test_cnc_without_masks_there_are_image_metrics_only(tree, cnc_trained, tmp_path, capsys):
    for cls in "ab":
        shutil.rmtree(tree / cls / "ground_truth")
    words = "--checkpoint", cnc_trained.checkpoint, "--out", tmp_path / "out"
    assert run("eval", *words, "--data", tree, script=cnc) == 0
    found, expected = (results(out)["cnc"]["pooled"] for out in (tmp_path / "out", cnc_trained.out))
    assert found == {k: v for k, v in expected.items() if k.startswith("I-")}
    assert "no masks" in capsys.readouterr().out


def test_cnc_a_class_may_lack_good_or_defective_test_images(tree, cnc_trained, tmp_path):
    shutil.rmtree(tree / "a/test/good")
    shutil.rmtree(tree / "b/test/hole")
    shutil.rmtree(tree / "b/ground_truth")
    words = "--checkpoint", cnc_trained.checkpoint, "--out", tmp_path / "out"
    assert run("eval", *words, "--data", tree, script=cnc) == 0
    assert [row["label"] for row in rows_of(tmp_path / "out")] == ["1"] * 3 + ["0"] * 3


# ---- CADA on CNC ---------------------------------------------------------------------------------
ON_CNC = ["--base", "cnc"]


@pytest.fixture(scope="module")
def on_cnc(data, session_path) -> Path:
    """The folder of `cada.py --base cnc`, which trains a CNC of its own."""
    out = session_path / "on_cnc"
    assert run(*ON_CNC, "--data", data, "--out", out, *CNC_FLAGS) == 0
    return out


def test_cada_on_cnc_leaves_the_detector_as_it_is(on_cnc, cnc_trained):
    """Its raw scores are those of cnc.py with the same flags."""
    np.testing.assert_array_equal(numbers(on_cnc, "raw"), numbers(cnc_trained.out, "score"))
    assert {p.name for p in listing(on_cnc)} == {
        "checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png", "distributions.png"}
    told = json.loads((on_cnc / "metrics.json").read_text())
    assert (told["script"], told["detector"]) == ("cada", "cnc")
    assert set(told["results"]) == {"raw", "cada", "oracle"} and told["config"]["theta"] == 1


def test_cada_on_cnc_aligns_by_its_formula(on_cnc):
    raw, aligned, u, gamma = numbers(on_cnc, "raw", "cada", "u", "gamma").T
    np.testing.assert_allclose(aligned, (raw - u) / (gamma - u), rtol=1e-3, atol=1e-3)


def test_cada_takes_a_trained_cnc_and_writes_elsewhere(on_cnc, cnc_trained, tmp_path, monkeypatch):
    """By default not into the folder of CNC's checkpoint; and it trains no step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cnc.CNC, "forward", lambda *args, **more: pytest.fail("it trained"))
    before = listing(cnc_trained.out)
    assert run(*ON_CNC, "--checkpoint", cnc_trained.checkpoint) == 0
    assert listing(cnc_trained.out) == before
    assert rows_of(tmp_path / "runs/cada") == rows_of(on_cnc)


def test_cada_on_cnc_eval_predict_and_resume(data, on_cnc, tmp_path, capsys):
    words = *ON_CNC, "--checkpoint", on_cnc / "checkpoint.pt", "--out", tmp_path / "out"
    assert run("eval", *words) == 0
    assert rows_of(tmp_path / "out") == rows_of(on_cnc)
    assert run("train", "--resume", *words) == 0
    assert rows_of(tmp_path / "out") == rows_of(on_cnc)
    capsys.readouterr()
    assert run("predict", *words, data / "a/test") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = {row["path"]: row for row in rows_of(on_cnc)}
    for line in told:
        row = rows[line["path"]]
        assert line["score"] == pytest.approx(float(row["cada"]), abs=1e-3)
        assert line["anomalous"] == (row["anomalous"] == "True")
        assert Path(line["overlay"]).is_file()
    assert len(told) == 6


def test_the_checkpoint_of_cada_on_cnc_is_one_of_cnc(on_cnc, cnc_trained, tmp_path):
    assert run("eval", "--checkpoint", on_cnc / "checkpoint.pt", "--out", tmp_path,
               script=cnc) == 0
    assert rows_of(tmp_path) == rows_of(cnc_trained.out)


def test_a_detector_without_cada_cannot_be_evaluated_as_one(cnc_trained, fails):
    for words in (["eval"], ["predict", "x.png"]):
        fails(*words, *ON_CNC, "--checkpoint", cnc_trained.checkpoint,
              says=["without CADA", f"--base cnc --checkpoint {cnc_trained.checkpoint} --out"])


def test_base_cnc_without_cnc(data, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "cnc", None)
    fails(*ON_CNC, "--data", data, says=["--base cnc", "cnc.py", "requirements.txt"])


# ---- several processes ---------------------------------------------------------------------------
# What a process of torchrun runs: a script's main(), which writes down the losses. Dropout, which
# each process draws for itself, is off, and the balance loss is heavy enough to be seen. RevDist's
# student is in float64: in float32 four steps of AdamW blow rounding up to 1e-3. Its BatchNorm is
# the SyncBatchNorm of GPUs, written out for CPUs, where PyTorch has none.
WORKER = """
import importlib, json, os, signal, sys, torch
name, losses, spoil, *words = sys.argv[1:]
script, rank = importlib.import_module(name), int(os.environ.get("RANK", 0))
class SyncBatchNorm(torch.nn.BatchNorm2d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = script.process()[1]
        mean = script.sum_over_processes(x.mean((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = script.sum_over_processes(centred.square().mean((0, 2, 3))) / count
        n = count * x.numel() / len(mean)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]
detector = script.RevDist if name == "cada" else script.CNC
forward, found = detector.forward, []
def no_memory(*args):
    raise MemoryError
def noted(self, *args, **more):
    if spoil == "memory" and rank == 1:
        no_memory()
    if spoil == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if spoil == "late" and rank == 0:
        script.write_scores = no_memory  # in the report: all others are done by then
    loss = forward(self, *args, **more)
    found.append(loss.item())
    return loss
detector.forward = noted
torch.nn.Dropout.forward = lambda self, x: x
save = script.save_checkpoint  # the last alone, and no pictures: half of the time
script.save_checkpoint = lambda path, content: "threshold" in content and save(path, content)
script.Figure.savefig = lambda self, path, **more: path.touch()
detector.BALANCE_WEIGHT = 1.0
if name == "cada":
    build, torch.Tensor.float = script.build, torch.Tensor.double
    def build_in_double(*args):
        built = build(*args)
        built[0].student.double()
        if "RANK" in os.environ:
            for m in built[0].student.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.__class__ = SyncBatchNorm
        return built
    script.build = build_in_double
if spoil == "union":  # one process, which takes the batches of both
    shuffled = script.shuffled
    def union(n, batch_size, steps, seed, rank):
        parts = [shuffled(n // 2, batch_size // 2, steps, seed, r) for r in (0, 1)]
        return [[2 * i + r for r in (0, 1) for i in parts[r][t]] for t in range(steps)]
    script.shuffled = union
code = script.main(words)
open(losses + f"-{rank}.json", "w").write(json.dumps(found))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def work(session_path):
    """Start WORKER alone or in two processes."""
    file = session_path / "worker.py"
    file.write_text(WORKER)

    def start(script, out, *words, spoil="-", count=2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        return subprocess.run(
            [sys.executable, *map(str, torchrun if count > 1 else []), str(file), script.__name__,
             f"{out}-losses", spoil, *map(str, words), "--out", str(out)], capture_output=True,
            text=True, timeout=200,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})

    return start


@pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
def test_two_processes_train_as_one_and_share_the_work(script, tree, work, tmp_path):
    """The same losses with the same global batches, and one report with every image once; one of
    the test images has gone, so that the shares differ."""
    (tree / "a/test/good/001.png").unlink()
    words = ["--data", tree, *FLAGS_OF[script], "--cache", "off" if script is cnc else "ram"]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(work, script, tmp_path / name, *words, spoil=spoil, count=count)
                for name, spoil, count in (("one", "union", 1), ("two", "-", 2))]
    for done in (job.result() for job in jobs):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("class mean") == 1
    one, *two = (np.array(json.loads((tmp_path / f"{name}.json").read_text()))
                 for name in ("one-losses-0", "two-losses-0", "two-losses-1"))
    assert len(one) >= 4 and not np.allclose(two[0], two[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.mean(two, axis=0), one, rtol=0, atol=1e-4)
    files = [{p.name for p in listing(tmp_path / name)} for name in ("one", "two")]
    assert files[0] == files[1]
    rows = [rows_of(tmp_path / name) for name in ("one", "two")]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]]
    score = {cada: "raw", cnc: "score"}[script]
    found = [numbers(tmp_path / name, score) for name in ("one", "two")]
    np.testing.assert_allclose(*found, rtol=5e-3)
    assert run("eval", "--checkpoint", tmp_path / "two/checkpoint.pt", "--out", tmp_path / "eval",
               script=script) == 0  # one process reads what two have written
    np.testing.assert_allclose(numbers(tmp_path / "eval", score), found[1], rtol=1e-3)


def test_processes_share_a_batch_evenly(data, monkeypatch, fails):
    monkeypatch.setattr(cnc, "process", lambda: (0, 2))
    fails("--data", data, *CNC_FLAGS, "--batch-size", 3, script=cnc,
          says=["--batch-size 3: must be a multiple of the 2 processes"])


@pytest.mark.parametrize("spoil", ["memory", "late"])
def test_a_failed_process_ends_all_with_one_line(spoil, data, work, tmp_path):
    out = tmp_path / "out"
    done = work(cnc, out, "--data", data, *CNC_FLAGS, spoil=spoil)
    lines = [line for line in done.stderr.splitlines() if "cnc.py: error" in line]
    assert done.returncode != 0 and len(lines) == 1 and "out of memory" in lines[0]
    assert "class mean" not in done.stdout
    assert (out / "checkpoint.pt").exists() == (spoil == "late")
    ours = done.stderr.split("elastic")[0]  # torchrun itself ends with a report of its own
    assert "Traceback" not in ours


def test_a_killed_process_ends_all(data, work, tmp_path):
    """It cannot speak, and torchrun may end the others before they notice."""
    done = work(cnc, tmp_path / "out", "--data", data, *CNC_FLAGS, spoil="kill")
    lines = [line for line in done.stderr.splitlines() if "cnc.py: error" in line]
    assert done.returncode != 0 and not (tmp_path / "out/checkpoint.pt").exists()
    assert len(lines) <= 1 and "Signal 9" in done.stderr
    assert "Traceback" not in done.stderr.split("elastic")[0]


def test_every_batchnorm_of_the_student_can_be_synchronised(detector):
    """What train_detector() does on several GPUs, by PyTorch's own function."""
    names = list(detector.student.state_dict())
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector.student)
    norms = [m for m in detector.student.modules()
             if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 20 and all(type(m) is torch.nn.SyncBatchNorm for m in norms)
    assert list(detector.student.state_dict()) == names


def test_one_process_a_gpu(monkeypatch, data, fails):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cada.choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    fails("--data", data, *FLAGS, "--device", "cuda", says=["--nproc-per-node", "2 GPUs"])


# ---- the README ----------------------------------------------------------------------------------
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_departure_is_in_the_ledger_and_in_the_code():
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py"))
    tags = re.findall(r"\[ours\](?: (D\d+|Dn))?", code)  # Dn: where the docstrings explain the tag
    ledger = re.findall(r"^\| (D\d+) \|", README, re.M)
    assert "" not in tags and ledger == [f"D{i + 1}" for i in range(len(ledger))]
    assert set(tags) - {"Dn"} == set(ledger)


def test_the_readme_is_short_and_links_to_what_is_there():
    assert len(README.split()) < 1800
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / link).is_file(), link


def test_the_cache_of_a_real_set_is_as_large_as_stated(on_meta):
    """By the shapes and the type of what the teachers give: MVTec AD / VisA, training images."""
    with torch.device("meta"):
        clip = cnc.Teacher(cnc.Config(weights="none"))
        found = (cada.Teacher("wide_resnet50_2", "none", 0)(torch.empty(1, 3, 256, 256)),
                 clip(torch.empty(1, 3, clip.preprocess.size, clip.preprocess.size)))
    sizes = [sum(f.numel() * f.itemsize for f in features) for features in found]
    cells = [f"{3629 * size / 2**30:.1f} / {8659 * size / 2**30:.1f} GiB" for size in sizes]
    assert f"| cached features | {' | '.join(cells)} |" in README


def test_every_command_of_the_readme_runs(tree, tmp_path, monkeypatch, capsys):
    """Word for word and in their order, on a tiny data set with tiny defaults; but those that CI
    runs as they are."""
    for name in ("mvtec", "mine"):
        shutil.copytree(tree, tmp_path / "data" / name)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "folder/1.png"):
        Image.fromarray(COLOURS).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for script, tiny in ((cada, TINY | {"iters": 2, "batch_size": 4}),
                         (cnc, CNC_TINY | {"epochs": 1})):
        defaults = {f.name: f.default for f in fields(script.Config)} | tiny | {"workers": 0}
        monkeypatch.setattr(script.Config.__init__, "__defaults__", tuple(defaults.values()))
    blocks = re.findall(r"^ *```\n(.*?)```", README, re.M | re.S)
    commands = [line.strip() for line in "".join(blocks).splitlines()
                if line.strip().startswith(("python ", "pytest ", "pip "))]
    in_ci = [line for line in commands if f'run "{line}"' in (HERE / ".ci/run").read_text()]
    assert len(in_ci) == 3 and len(commands) > 8
    for line in commands:
        if line not in in_ci:
            script, *words = shlex.split(line)[1:]
            assert {"cada.py": cada, "cnc.py": cnc}[script].main(words) == 0, line
    assert capsys.readouterr().out.count('"overlay"') == 2


# ---- both scripts --------------------------------------------------------------------------------
def shared_sections(script) -> dict[str, str]:
    """{name: text} of what stands between `# ==== shared: NAME` and `# ==== end shared`."""
    source = Path(script.__file__).read_text()
    found = re.findall(r"^# ==== shared: (.+?)$\n(.*?)^# ==== end shared$", source, re.M | re.S)
    assert len(dict(found)) == source.count("==== shared:") == source.count("==== end shared")
    return dict(found)


def test_cada_and_cnc_share_sections_letter_for_letter():
    ours, theirs = shared_sections(cada), shared_sections(cnc)
    assert list(ours) == list(theirs) and len(ours) >= 8
    for name in ours:
        assert ours[name] == theirs[name], f"the copies of {name!r} differ"
    assert sum(len(text.splitlines()) for text in ours.values()) > 400


def imports(tree) -> set[str]:
    """Names of the modules that are imported anywhere in a syntax tree."""
    nodes = list(ast.walk(tree))
    return ({a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            | {n.module for n in nodes if isinstance(n, ast.ImportFrom)})


def test_neither_script_imports_the_other_but_cada_for_base_cnc():
    ours, theirs = (ast.parse(Path(script.__file__).read_text()) for script in (cada, cnc))
    choose_base = next(n for n in ours.body if getattr(n, "name", "") == "choose_base")
    assert imports(choose_base) == {"cnc"}
    ours.body.remove(choose_base)
    assert "torch" in imports(ours) & imports(theirs)
    assert "cnc" not in imports(ours) and "cada" not in imports(theirs)


def test_neither_script_reads_the_checkpoint_of_another_detector(trained, cnc_trained, fails):
    for script, other in ((cada, cnc_trained), (cnc, trained)):
        for words in (["eval"], ["predict", "x.png"], ["--resume"]):
            fails(*words, "--checkpoint", other.checkpoint, script=script,
                  says=[str(other.checkpoint), "its detector is", "--base"])


# ---- bad input -----------------------------------------------------------------------------------
@pytest.fixture
def fails(tmp_path, capsys):
    """Run the command line and see it end as a user's mistake should: exit code 2, one line that
    says what is wrong, and an output folder (tmp_path/out) without anything new in it."""
    def check(*words, says, script=cada):
        before = listing(tmp_path / "out")
        code = run(*words, "--out", tmp_path / "out", script=script)
        lines, name = capsys.readouterr().err.splitlines(), f"{script.__name__}.py: error: "
        assert code == 2
        assert [line for line in lines if line.startswith(name)] == lines[-1:]
        assert not any("Traceback" in line for line in lines)
        for word in says:
            assert word in lines[-1]
        assert listing(tmp_path / "out") == before

    return check


def missing_folder(tree):
    shutil.rmtree(tree)
    return [str(tree), "no such folder"]


def empty_folder(tree):
    shutil.rmtree(tree)
    tree.mkdir()
    return [str(tree), "no training images"]


def a_class_without_training_images(tree):
    for path in (tree / "a/train/good").iterdir():
        path.unlink()
    return [str(tree / "a/train/good"), "no training images"]


def no_test_images(tree):
    for cls in "ab":
        shutil.rmtree(tree / cls / "test")
        shutil.rmtree(tree / cls / "ground_truth")
    return [str(tree), "no test images"]


def unreadable_image(tree):
    path = tree / "a/train/good/003.png"
    path.write_text("this is no image")
    return [str(path)]


def truncated_image(tree):
    path = tree / "b/test/good/001.png"
    path.write_bytes(path.read_bytes()[:-2000])
    return [str(path)]


def empty_image(tree):
    path = tree / "b/train/good/000.png"
    path.write_bytes(b"")
    return [str(path)]


def mask_without_image(tree):
    (tree / "a/test/hole/001.png").unlink()
    return [str(tree / "a/ground_truth/hole/001_mask.png")]


def mask_without_folder_of_images(tree):
    """Such as a misspelled kind of defect: its images would count as unmasked, or be missed."""
    mask = save(Image.new("L", (64, 64), 255), tree / "a/ground_truth/scratch/000_mask.png")
    return [str(mask)]


def image_without_mask(tree):
    (tree / "a/ground_truth/hole/001_mask.png").unlink()
    return [str(tree / "a/test/hole/001.png")]


def two_masks_of_one_image(tree):
    masks = tree / "a/ground_truth/hole"
    shutil.copy(masks / "000_mask.png", masks / "000.png")
    return [str(masks / "000"), "two masks"]


def mask_of_another_size(tree):
    mask = save(Image.new("L", (64, 80), 255), tree / "b/ground_truth/hole/002_mask.png")
    return [str(mask), "80 x 64"]


def unreadable_mask(tree):
    path = tree / "b/ground_truth/hole/002_mask.png"
    path.write_text("this is no image")
    return [str(path)]


@pytest.mark.parametrize("spoil", [
    missing_folder, empty_folder, a_class_without_training_images, no_test_images,
    unreadable_image, truncated_image, empty_image, mask_without_image,
    mask_without_folder_of_images, image_without_mask, two_masks_of_one_image,
    mask_of_another_size, unreadable_mask], ids=lambda f: f.__name__)
def test_bad_data(spoil, tree, fails):
    says = spoil(tree)
    fails("train", "--data", tree, *FLAGS, says=says)


def test_visa_image_that_is_not_there(visa, fails):
    image = visa / "pcb1/Data/Images/Normal/0001.JPG"
    image.unlink()
    fails("--data", visa, *FLAGS, says=[str(image)])


def test_visa_split_file_without_its_columns(visa, fails):
    (visa / "split_csv/1cls.csv").write_text("object,split,image\ncandle,train,x.JPG\n")
    fails("--data", visa, *FLAGS, says=["1cls.csv"])


@pytest.mark.parametrize("words, says", [
    ("explain", ["explain", "train, eval or predict"]),
    ("train data/mvtec", ["data/mvtec", "--data"]),
    ("predict", ["image or folder"]),
    ("--frobnicate 3", ["--frobnicate"]),
    ("--iters ten", ["--iters", "ten"]),
    ("--iters 0", ["--iters"]),
    ("--batch-size -4", ["--batch-size"]),
    ("--lr 0", ["--lr"]),
    ("--lr nan", ["--lr"]),
    ("--seed -1", ["--seed"]),
    ("--workers -1", ["--workers"]),
    ("--quantile 1.5", ["--quantile"]),
    ("--image-size 100", ["--image-size", "32"]),
    ("--image-size 0", ["--image-size"]),
    ("--cache tape", ["--cache", "ram"]),
    ("--device abacus", ["--device", "cuda"]),
    ("--loss mse", ["--loss", "flat"]),
    ("--teacher vgg16", ["--teacher vgg16", "wide_resnet50_2"]),
    ("--teacher resnet18 --weights IMAGENET1K_V9", ["--weights", "IMAGENET1K_V1"]),
    ("--checkpoint nowhere.pt", ["nowhere.pt", "no such file"]),
    ("--base unet", ["--base", "cnc"]),
    ("--base cnc --iters 3", ["--iters"]),
    ("--base cnc --teacher resnet18", ["--teacher resnet18", "ViT-B-16"]),
    ("--resume", ["checkpoint.pt", "no such file"]),
    ("eval", ["checkpoint.pt", "no such file"]),
    ("eval --checkpoint nowhere.pt", ["nowhere.pt", "no such file"])])
def test_bad_flags(words, says, data, fails):
    fails(*words.split(), "--data", data, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(data, fails):
    fails("--data", data, *FLAGS, "--device", "cuda", says=["--device cuda", "cpu"])


def nan_loss(script, monkeypatch, tmp_path):
    loss = DETECTOR_OF[script].forward
    monkeypatch.setattr(DETECTOR_OF[script], "forward", lambda *a, **k: loss(*a, **k) * math.nan)
    return [], ["loss", "nan", "--lr"]


def diverged_in_the_last_step(script, monkeypatch, tmp_path):
    """The last loss is still finite; the weights after it are not."""
    one_step = ["--iters", 1] if script is cada else ["--epochs", 1, "--batch-size", 12]
    return [*one_step, "--lr", 1e30], ["--lr"]


def out_of_memory(script, monkeypatch, tmp_path):
    def loss(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")

    monkeypatch.setattr(DETECTOR_OF[script], "forward", loss)
    return [], ["out of memory", "--batch-size"]


def full_disk_for_the_cache(script, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    return ["--cache", "disk"], ["--cache", "space"]


def no_network(script, monkeypatch, tmp_path):
    def urlopen(*args, **more):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return ["--weights", "IMAGENET1K_V1"], ["--weights IMAGENET1K_V1", "FILE", "none"]


@pytest.mark.parametrize("script, spoil", [
    *((script, spoil) for script in (cada, cnc)
      for spoil in (nan_loss, diverged_in_the_last_step, out_of_memory)),
    (cada, full_disk_for_the_cache), (cada, no_network)], ids=lambda x: x.__name__)
def test_a_run_that_cannot_go_on(script, spoil, data, tmp_path, monkeypatch, fails):
    words, says = spoil(script, monkeypatch, tmp_path)
    fails("--data", data, *FLAGS_OF[script], *words, says=says, script=script)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664]")], ids=["OSError", "RuntimeError"])
@pytest.mark.parametrize("old", [None, b"an earlier run's"], ids=["new", "overwriting"])
def test_full_disk_for_the_checkpoint(error, old, data, tmp_path, monkeypatch, fails):
    """What was there stays, and no partial file is left."""
    def fill(content, path):
        Path(path).write_bytes(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fill)
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/checkpoint.pt").write_bytes(old)
    fails("--data", data, *FLAGS, says=["checkpoint.pt", "--out"])
    assert not old or (tmp_path / "out/checkpoint.pt").read_bytes() == old


def test_out_is_a_file(data, tmp_path, fails):
    (tmp_path / "out").write_text("not a folder")
    fails("--data", data, *FLAGS, says=[str(tmp_path / "out")])


def test_weights_that_do_not_fit(weights_files, data, tmp_path, fails):
    fails("--data", data, *FLAGS, "--teacher", "resnet34", "--weights", weights_files[0],
          says=[str(weights_files[0]), "does not fit resnet34"])
    (tmp_path / "garbage.pth").write_bytes(bytes(range(256)))
    fails("--data", data, *FLAGS, "--weights", tmp_path / "garbage.pth",
          says=[str(tmp_path / "garbage.pth")])


def test_not_a_checkpoint(tmp_path, weights_files, fails):
    garbage, other = tmp_path / "garbage.pt", tmp_path / "other.pt"
    garbage.write_bytes(bytes(range(256)))
    torch.save({"script": "cnc"}, other)
    for path in (garbage, other, weights_files[0]):
        fails("eval", "--checkpoint", path, says=[str(path)])


@pytest.mark.parametrize("words, says", [
    ("eval --image-size 96", ["--image-size 96", "64"]),
    ("eval --teacher resnet34", ["--teacher resnet34", "resnet18"]),
    ("eval --weights IMAGENET1K_V1", ["--weights IMAGENET1K_V1", "none"]),
    ("eval --batch-size 0", ["--batch-size 0"]),
    ("predict x.png --workers -1", ["--workers -1"]),
    ("train --resume --iters 8", ["--iters 8", "4"]),
    ("predict nowhere.png", ["nowhere.png"]),
    ("predict nowhere.png --workers 1", ["nowhere.png"])])  # told by a worker process
def test_a_good_checkpoint_and_a_bad_command(words, says, trained, fails):
    fails(*words.split(), "--checkpoint", trained.checkpoint, says=says)


def test_predict_on_a_folder_without_images(trained, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    fails("predict", tmp_path / "empty", "--checkpoint", trained.checkpoint,
          says=[str(tmp_path / "empty"), "no images"])


# ---- CNC: bad input ------------------------------------------------------------------------------
@pytest.mark.parametrize("words, says", [
    ("--taps 7", ["--taps 7", "6"]),
    ("--taps 0,3", ["--taps 0,3", "6"]),
    ("--taps 4,2", ["--taps 4,2", "rising"]),
    ("--taps 2,2", ["--taps 2,2", "rising"]),
    ("--taps two,4", ["--taps two,4", "numbers"]),
    ("--taps 2;4", ["--taps 2;4", "commas"]),
    ("--top-k 6", ["--top-k 6", "5"]),
    ("--top-k 0", ["--top-k 0"]),
    ("--experts 1", ["--top-k 2", "1"]),
    ("--experts 0", ["--experts 0"]),
    ("--theta -1", ["--theta -1"]),
    ("--tau 0", ["--tau 0"]),
    ("--tau nan", ["--tau nan"]),
    ("--epochs 0", ["--epochs 0"]),
    ("--lr 0", ["--lr"]),
    ("--iters 5", ["--iters"]),
    ("--image-size 70", ["--image-size 70", "multiple"]),
    ("--image-size 0", ["--image-size 0", "multiple"]),
    ("--image-size -32", ["--image-size -32", "multiple"]),
    ("--clip -1", ["--clip -1"]),
    ("--teacher vgg16", ["--teacher vgg16", "ViT-B-32", "tiny"]),
    ("--weights openai", ["--weights openai", "tiny", "FILE"]),
    ("--teacher ViT-B-32 --weights laion9b", ["--weights laion9b", "laion2b_s34b_b79k", "FILE"]),
    ("--weights nowhere.pt", ["--weights nowhere.pt", "no such file"]),
    ("--checkpoint old.pt", ["--checkpoint", "--resume"]),
    ("--resume", ["checkpoint.pt", "no such file"])])
def test_cnc_bad_flags(words, says, data, fails):
    given = words.split()
    tiny = [] if given[0] == "--resume" else CNC_FLAGS
    fails("--data", data, *tiny, *given, says=says, script=cnc)


@pytest.mark.parametrize("name", [
    "RN50", "convnext_base",  # convolutions: no patch tokens
    "EVA02-B-16", "coca_ViT-B-32",  # a ViT of timm's, one pooled by attention
    "ViT-B-16-SigLIP", "roberta-ViT-B-32"])  # no CLS token, a text tower of Hugging Face's
def test_cnc_a_clip_without_what_it_needs_is_refused(name, data, on_meta, fails):
    fails("--data", data, *CNC_FLAGS, "--teacher", name, "--image-size", 224, says=[name],
          script=cnc)


@pytest.mark.parametrize("name, shape, multiple", [("ViT-B-16", 100, 16), ("ViT-L-14", 320, 14)])
def test_cnc_size_must_be_a_multiple_of_the_patch(name, shape, multiple, data, on_meta, fails):
    fails("--data", data, *CNC_FLAGS, "--teacher", name, "--image-size", shape, script=cnc,
          says=[f"--image-size {shape}", name, "multiple", str(multiple)])


@pytest.mark.parametrize("content", [
    b"these are no weights", b"", b"\x80\x02}q\x00.", {"weight": torch.zeros(3)}],
    ids=["text", "empty", "an empty pickle", "other weights"])
def test_cnc_weights_that_do_not_fit(content, data, tmp_path, fails):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    fails("--data", data, *CNC_FLAGS, "--weights", path, says=[f"--weights {path}", "tiny"],
          script=cnc)


@pytest.mark.parametrize("error", [
    URLError("Name or service not known"), OSError("Tunnel connection failed: 403 Forbidden"),
    FileNotFoundError("Failed to download file (open_clip_pytorch_model.bin)\nLast error: no"),
    RuntimeError("the SHA256 checksum does not match")], ids=lambda e: type(e).__name__)
def test_cnc_no_network(error, data, monkeypatch, fails):
    def download(*args, **more):
        raise error

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    fails("--data", data, *CNC_FLAGS, "--teacher", "ViT-B-32", "--weights", "openai",
          "--image-size", 224, says=["--weights openai", "ViT-B-32", "FILE", "none"], script=cnc)


@pytest.mark.parametrize("words, says", [
    ("eval --image-size 96", ["--image-size 96", "64"]),
    ("eval --teacher ViT-B-32", ["--teacher ViT-B-32", "tiny"]),
    ("eval --weights openai", ["--weights openai", "none"]),
    ("eval --no-moe", ["--no-moe"]),
    ("eval --taps 1,2", ["--taps 1,2"]),
    ("eval --batch-size 0", ["--batch-size 0"]),
    ("train --resume --theta 0", ["--theta 0", "1"]),
    ("predict nowhere.png", ["nowhere.png"])])
def test_cnc_a_good_checkpoint_and_a_bad_command(words, says, cnc_trained, fails):
    fails(*words.split(), "--checkpoint", cnc_trained.checkpoint, says=says, script=cnc)

# ---- hardening -----------------------------------------------------------------------------------
SMALL = {cada: [*FLAGS, "--image-size", 32, "--iters", 2, "--cache", "disk"],
         cnc: [*CNC_FLAGS, "--image-size", 32, "--cache", "disk"]}
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0  # whom no permission stops
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and sends them signals")


def child(name: str, words: list[str], log: str, interrupt: tuple[str, int] | None,
          spawn: bool) -> None:
    """The command line in a process of its own; `interrupt`, such as ("torch.optim:Adam step", 3),
    presses Ctrl-C at the end of the third call of that function; `spawn`: as on Windows."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.setpgrp()  # Ctrl-C reaches the processes that read images, too, and not this test
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may lack it
    multiprocessing.set_start_method("spawn" if spawn else "fork", force=True)
    Figure.savefig = lambda self, path, **more: Path(path).write_bytes(b"half of a run's time")
    if interrupt:
        owner, attribute = interrupt[0].split()
        owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
        function = getattr(owner, attribute)

        def wrapped(*args, **more):
            result = function(*args, **more)
            if next(calls) == interrupt[1]:
                os.killpg(0, signal.SIGINT)
            return result

        setattr(owner, attribute, wrapped)
    if spawn:  # as a script, which the processes that it spawns import again
        sys.argv[1:] = words
        runpy.run_path(sys.modules[name].__file__, run_name="__main__")
    sys.exit(run(*words, script=sys.modules[name], everything=True))


@pytest.fixture
def start(monkeypatch):
    """Start child(): by fork from a process that has imported everything and done nothing."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context, children = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([__name__])

    def start(script, *words, log: Path, interrupt=None, spawn=False):
        words = [str(w) for w in words]
        children.append(context.Process(target=child, args=(script.__name__, words, str(log),
                                                            interrupt, spawn)))
        children[-1].start()
        return children[-1]

    yield start
    for process in children:
        process.kill()


def ended(process) -> int:
    process.join(120)
    return process.exitcode


def small_run(start, data, script, out: Path, *more, **how):
    return start(script, "--data", data, "--out", out, *SMALL[script], *more,
                 log=out.with_suffix(".log"), **how)


def goes_on(start, data, runs: dict, whole: dict) -> None:
    """Resume what was stopped, {folder: script}, all at once, or if there is no checkpoint yet, be
    told so and begin anew: the results are those of the uninterrupted runs in the folders `whole`,
    and nothing else is left."""
    resumed = {out: small_run(start, data, script, out, "--resume") for out, script in runs.items()}
    for out, script in runs.items():
        had_checkpoint = (out / "checkpoint.pt").exists()
        code, told = ended(resumed[out]), out.with_suffix(".log").read_text().splitlines()
        if code == 2 and not had_checkpoint:
            assert len(told) == 1 and f"{out / 'checkpoint.pt'}: no such file" in told[0]
            code, told = ended(small_run(start, data, script, out)), []
        assert code == 0, told
        assert results(out) == results(whole[script])
        assert {p.name for p in listing(out)} == {p.name for p in listing(whole[script])}
        shutil.rmtree(out)


@pytest.fixture
def whole(start, data, session_path) -> dict:
    """Folders of uninterrupted small runs, by script."""
    folders = {script: session_path / f"whole-{script.__name__}" for script in SMALL}
    if not all(folder.exists() for folder in folders.values()):
        jobs = [small_run(start, data, *item) for item in folders.items()]
        assert [ended(job) for job in jobs] == [0, 0]
    return folders


@forks
def test_kill_9_at_any_moment_costs_nothing_but_time(data, start, whole, tmp_path):
    """20 moments in runs of both scripts, 5 of each in fresh and 5 in resumed ones: while reading,
    training, saving, evaluating."""
    rng, kills, found = random.Random(0), 0, set()
    seconds = {s: json.loads((whole[s] / "metrics.json").read_text())["seconds"] for s in whole}
    for i in range(5):
        outs = {tmp_path / f"{s.__name__}-{i}": s for s in whole}
        for part in (i, 4 - i):  # of a run's time, in fifths
            moments = {out: (part + rng.random()) / 5 * seconds[s] for out, s in outs.items()}
            jobs = {out: small_run(start, data, s, out,
                                   *["--resume"] * (out / "checkpoint.pt").exists())
                    for out, s in outs.items()}
            began = time.perf_counter()
            for out in sorted(moments, key=moments.get):
                time.sleep(max(0, began + moments[out] - time.perf_counter()))
                jobs[out].kill()
            for out, job in jobs.items():
                kills += ended(job) == -signal.SIGKILL  # else it had already ended
                found.add((out / "checkpoint.pt").exists())
        goes_on(start, data, outs, whole)
    assert kills > 5 and found == {False, True}  # 18, unless the machine has changed its pace


@forks
def test_control_c_at_any_moment_costs_nothing_but_time(data, start, whole, tmp_path):
    """Exit code 130 and one line; in the training also a checkpoint, and never half a step."""
    moments = [  # flags, where it is pressed, at which call; must there be a checkpoint then?
        (cada, "", "cada load_image", 5, False),
        (cada, "--workers 1", "cada:Images __getitem__", 3, False),
        (cada, "", "cada:RevDist forward", 1, True),
        (cada, "--workers 1 --cache off", "torch.optim:AdamW step", 1, True),
        (cada, "", "torch save", 1, True), (cada, "", "cada write_scores", 1, True),
        (cnc, "", "cnc:CNC forward", 1, True), (cnc, "", "torch.optim:Adam step", 4, True)]
    outs = {tmp_path / str(i): moment[0] for i, moment in enumerate(moments)}
    jobs = [small_run(start, data, script, out, *words.split(), interrupt=tuple(where))
            for out, (script, words, *where, _) in zip(outs, moments)]
    wrong = {}
    for job, out, (script, _, *where, checkpoint) in zip(jobs, outs, moments):
        code, told = ended(job), out.with_suffix(".log").read_text().splitlines()
        errors = [line for line in told if line.startswith(f"{script.__name__}.py: error: ")]
        exists = (out / "checkpoint.pt").exists()
        if (code, errors) != (130, told[-1:]) or "interrupted" not in told[-1] or \
                exists < checkpoint or any("Traceback" in line for line in told):
            wrong[tuple(where)] = code, exists, told[-1]
    assert not wrong
    goes_on(start, data, {out: s for out, s in outs.items() if (out / "checkpoint.pt").exists()},
            whole)


@forks
def test_a_folder_takes_one_training_at_a_time(data, start, tmp_path, fails):
    """And is free again as soon as the other process is gone, however it ended."""
    out, log = tmp_path / "out", tmp_path / "log"
    first = start(cada, "--data", data, "--out", out, *FLAGS, "--iters", 99999, "--cache", "off",
                  "--workers", 1, log=log)
    while first.is_alive() and "output in" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.05)
    for script, words in ((cada, FLAGS), (cnc, CNC_FLAGS), (cada, ["--base", "cnc", *CNC_FLAGS])):
        fails("--data", data, *words, says=["--out", str(out)], script=script)
    first.kill()
    assert ended(first) == -signal.SIGKILL
    assert run("--data", data, "--out", out, *FLAGS, "--iters", 1) == 0


@forks
def test_processes_that_read_images_may_be_spawned(data, start, weights_files, tmp_path,
                                                   monkeypatch):
    """Each imports the script again, as on Windows; and an import prints and writes nothing."""
    for folder in ("fork", "spawn"):
        (tmp_path / folder / "empty").mkdir(parents=True)
    jobs = []
    for folder, workers in (("fork", 0), ("spawn", 1)):
        monkeypatch.chdir(tmp_path / folder / "empty")
        jobs.append(start(cada, "--data", data, "--out", "../out", *FLAGS, "--iters", 1,
                          "--weights", weights_files[0], "--workers", workers,
                          log=tmp_path / folder / "log", spawn=folder == "spawn"))
    assert [ended(job) for job in jobs] == [0, 0]
    one, other = tmp_path / "fork", tmp_path / "spawn"
    assert results(one / "out") == results(other / "out")
    assert (one / "log").read_text() == (other / "log").read_text()
    assert not listing(other / "empty")


@pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
def test_an_import_defines_and_does_nothing_else(script):
    kinds = {type(n).__name__ for n in ast.parse(Path(script.__file__).read_text("utf-8")).body[1:]}
    assert kinds <= {"Import", "ImportFrom", "Assign", "FunctionDef", "ClassDef", "If"}


# What can be wrong with a file.
def bomb(side: int = 20_000) -> bytes:
    """A black PNG of side x side pixels in a few kilobytes."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 1)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))


SPOIL = {"truncated": lambda path, old: path.write_bytes(old[:len(old) // 2]),
         "empty": lambda path, old: path.touch(),
         "text": lambda path, old: path.write_text("this is no image"),
         "folder": lambda path, old: path.mkdir(),
         "dangling link": lambda path, old: path.symlink_to("nowhere.png"),
         "link to itself": lambda path, old: path.symlink_to(path.name),
         "unreadable": lambda path, old: path.touch(0),
         "bomb": lambda path, old: path.write_bytes(bomb())}
KINDS = {"tree": ["a/train/good/000.png", "a/test/good/000.png", "a/test/hole/000.png",
                  "a/ground_truth/hole/000_mask.png"],
         "visa": ["split_csv/1cls.csv", "pcb1/Data/Images/Normal/0000.JPG",
                  "pcb1/Data/Images/Normal/0004.JPG", "pcb1/Data/Images/Anomaly/000.JPG",
                  "pcb1/Data/Masks/Anomaly/000.png"]}


@pytest.mark.parametrize("layout, how, kind", [
    pytest.param(layout, how, kind, marks=[pytest.mark.skipif(
        how == "unreadable" and IS_ROOT, reason="root may read everything")])
    for layout in KINDS for how in SPOIL for kind in KINDS[layout]
    if (layout, how) != ("tree", "folder")])
def test_a_spoilt_file_is_named(layout, how, kind, request, fails):
    """Every kind of file, spoilt in every way; in a folder to predict, too."""
    root = request.getfixturevalue(layout)
    path = root / kind
    old = path.read_bytes()
    path.unlink()
    SPOIL[how](path, old)
    fails("--data", root, *FLAGS, "--weights", "nowhere",  # noticed later
          says=[path.name if path.suffix == ".csv" else str(path)])
    if path.suffix != ".csv" and how != "folder":
        with pytest.raises(cada.UserError, match=path.name):
            cada.find_images([str(path.parent)])


@pytest.mark.parametrize("folder", ["a", "a/test/good", "a/ground_truth/hole"])
def test_a_folder_that_may_not_be_read_is_named(folder, tree, monkeypatch, fails):
    """As it is told to one who is not root, who may read everything."""
    listdir = os.listdir

    def forbidden(path):
        if Path(path) == tree / folder or folder == "a":
            raise PermissionError(13, "Permission denied", str(tree / folder))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", forbidden)
    fails("--data", tree, *FLAGS, says=[f"no permission for {tree / folder}"])


def test_a_folder_is_no_image(tree):
    before = cada.read_dataset(tree)
    for kind in KINDS["tree"]:
        (tree / kind).with_name("x.png").mkdir()
    assert cada.read_dataset(tree) == before


def test_a_visa_split_file_may_be_cut_anywhere(visa, fails):
    """What is left may be a whole data set; else the split file or an image is named."""
    path = visa / "split_csv/1cls.csv"
    *lines, normal, a, b, c = path.read_text().splitlines()
    content = "\n".join([*lines, a, b, c, normal])
    for cut in range(2, len(c) + len(normal), 2):
        path.write_text(content[:-cut])
        fails("--data", visa, *FLAGS, "--weights", "nowhere", says=[])


NAMES = ["two words, it's \"quoted\"", "new\nline\t", "Stück-日本", "-dash;", "$x^$ 100% {x}",
         "trailing.", "_"]


def test_names_come_through_unchanged(data, trained, tmp_path, monkeypatch, capsys, fails):
    """Of classes, kinds of defects and images: in scores.csv and in what predict prints."""
    names = [n for n in NAMES if os.name != "nt" or not set(n) & set('"\n\t') and n[-1] != "."]
    tree = tmp_path / "tree"
    for n in names:
        for old, new in (("train/good/000.png", f"train/good/{n}.png"),
                         ("test/good/000.png", f"test/good/{n}.png"),
                         ("test/hole/000.png", f"test/{n}/{n}.png"),
                         ("ground_truth/hole/000_mask.png", f"ground_truth/{n}/{n}_mask.png")):
            (tree / n / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / "a" / old, tree / n / new)
    images = [p for n in names for p in (tree / n / f"test/good/{n}.png",
                                         tree / n / f"test/{n}/{n}.png")]
    words = "--checkpoint", trained.checkpoint, "--out", tmp_path / "out"
    assert run("eval", "--data", tree, *words, everything=True) == 0
    rows = rows_of(tmp_path / "out")
    assert sorted(row["path"] for row in rows) == sorted(map(str, images))
    assert {row["class"] for row in rows} == set(names)
    capsys.readouterr()
    monkeypatch.chdir(images[0].parent)
    assert run("predict", *words, "--", *images[1:], images[0].name) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in told] == [*map(str, images[1:]), images[0].name]
    assert all(Path(row["overlay"]).is_file() for row in told)
    assert len({row["overlay"] for row in told}) == len(images)
    images[-1].write_text("no image")
    fails("--data", tree, *FLAGS, says=["cannot read image"])  # in one line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_unicode_is_told_at_once(tree, trained, fails):
    image = tree / "a/test/good" / os.fsdecode(b"caf\xe9.png")
    (tree / "a/test/good/000.png").rename(image)
    fails("--data", tree, *FLAGS, "--weights", "nowhere", says=["caf", ".png"])
    fails("predict", image, "--checkpoint", trained.checkpoint, says=["caf", ".png"])


class Payload:
    """A pickle of it, when loaded, creates a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def save_tar(content, path: Path) -> None:
    """PyTorch's oldest format, which weights_only did not guard before 2.6 (CVE-2025-32434)."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            part = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))


MALICIOUS = {
    "pickle.pt": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "zip.pt": lambda content, path: torch.save(content, path),
    "legacy.pt": lambda content, path: torch.save(content, path,
                                                  _use_new_zipfile_serialization=False),
    "tar.pt": save_tar,
    "numpy.npz": lambda content, path: np.savez(path, **content),
    "numpy.npy": lambda content, path: np.save(path, content)}
READERS = [(cada, "eval --checkpoint"), (cada, "predict x.png --checkpoint"),
           (cada, "--resume --checkpoint"), (cada, "--checkpoint"), (cada, "FLAGS --weights"),
           (cada, "eval --base cnc --checkpoint"), (cada, "--base cnc CNC --weights"),
           (cnc, "eval --checkpoint"), (cnc, "predict x.png --checkpoint"),
           (cnc, "--resume --checkpoint"), (cnc, "CNC --weights"),
           (cnc, "CNC --image-size 224 --teacher ViT-B-32 --weights")]


@pytest.mark.parametrize("name", MALICIOUS)
def test_no_file_runs_code(name, data, tmp_path, on_meta, fails):
    file, ran = tmp_path / name, tmp_path / "ran"
    content = {"detector": "revdist", "state_dict": {}, "visual": Payload(ran)}
    MALICIOUS[name](content, file)
    with suppress(Exception):
        found = (np.load(file, allow_pickle=True) if "numpy" in name
                 else torch.load(file, weights_only=False))
        found["visual"]
    ran.rmdir()  # so the payload works
    flags = {"FLAGS": ["--data", data, *FLAGS], "CNC": ["--data", data, *CNC_FLAGS]}
    for script, words in READERS:
        words = sum((flags.get(word, [word]) for word in words.split()), [])
        fails(*words, file, says=[str(file)], script=script)
        assert not ran.exists()


def make_unwritable(out: Path, how: str) -> Path:
    if how == "below a file":
        out.write_text("not a folder")
        return out / "below"
    if how == "read-only":
        out.mkdir(0o555)
        return out
    if how == "nobody's":
        return Path("/proc/self")
    out.symlink_to("nowhere" if how == "dangling link" else out.name)
    return out


@pytest.mark.parametrize("script, how, command", [
    *((script, "dangling link", command) for script in (cada, cnc)
      for command in ("train", "eval", "predict")),
    (cada, "below a file", "train"), (cada, "link to itself", "train"),
    pytest.param(cada, "read-only", "train", marks=pytest.mark.skipif(
        IS_ROOT, reason="root may write")),
    pytest.param(cada, "nobody's", "train", marks=pytest.mark.skipif(
        not Path("/proc/self").exists(), reason="no /proc, where not even root can write"))])
def test_out_cannot_be_written(script, how, command, data, trained, cnc_trained, tmp_path, capsys):
    out = make_unwritable(tmp_path / "out", how)
    words = ["--checkpoint", {cada: trained, cnc: cnc_trained}[script].checkpoint]
    words = ["--data", data, *FLAGS_OF[script]] if command == "train" else [command, *words]
    words += [data / "a/test/hole/000.png"] if command == "predict" else []
    assert run(*words, "--out", out, script=script) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "error: " in line] == told[-1:] and str(out) in told[-1]
    assert "Traceback" not in "".join(told)


# ---- benchmark: python test_smoke.py bench -------------------------------------------------------
def in_turn(repeats: int = 5, **work) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that noise of the machine hits all."""
    seconds = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def gmac(function) -> float:
    """Billions of multiply-adds, counted by PyTorch. Attention's fast path hides its own."""
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        function()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() / 2e9


def report(what: str, value: str, target: str = "") -> None:
    print(f"{what:<66}{value:>22}  {target}", flush=True)


def photographs(folder: Path, n: int, side: int) -> list[cada.Sample]:
    rng = np.random.default_rng(0)
    return [cada.Sample(save(draw(rng, "a", (side, side), False)[0], folder / f"{i}.png"), "a", 0)
            for i in range(n)]


def cnc_steps(detector, source, cfg, batches):
    """A function that trains on `batches`, as train_detector() does."""
    parameters = [p for p in detector.parameters() if p.requires_grad]
    optimizer, device = torch.optim.Adam(parameters, 1e-3, fused=True), torch.device("cpu")

    def work():
        detector.train()
        for features in cnc.feature_batches(source, batches, detector.teacher, device, 0):
            optimizer.zero_grad(set_to_none=True)
            detector(features).backward()
            torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            optimizer.step()

    return work


def bench_cnc(folder: Path) -> None:
    """Items 1 and 5 on ViT-B/16 with random weights, 224 x 224, 197 tokens of 768."""
    cfg = cnc.Config(teacher="ViT-B-16", weights="none", device="cpu")
    detector, device = cnc.build(cfg)
    images = cnc.Images(photographs(folder, 16, 224), detector.preprocess)
    cache = cnc.FeatureCache(detector.teacher, 16, cnc.image_loader(images, device, 0,
                                                                    batch_size=8), "ram", folder)
    epoch = {name: cnc_steps(detector, source, cfg, cnc.in_order(16, 8))
             for name, source in (("cached", cache), ("off", images))}
    bound = gmac(epoch["off"]) / gmac(epoch["cached"])
    t = in_turn(**epoch)
    report("CNC epoch, ViT-B/16, batch 8: --cache off / cached", f"{t['off'] / t['cached']:.2f} x",
           f"at least 90 % of the bound by multiply-adds, {bound:.2f} x")
    bench_evaluation("CNC, ViT-B/16", cnc, detector, images, device, 8)


def bench_revdist(folder: Path) -> None:
    """Items 2 and 5 on WideResNet50-2 with random weights, 256 x 256."""
    cfg = cada.Config(weights="none", device="cpu")
    detector, device = cada.build(cfg)
    teacher = detector.teacher
    images = cada.Images(photographs(folder, 4, 256), detector.preprocess)
    batch = next(cada.image_loader(images, device, 0, batch_size=4))
    cache = cada.FeatureCache(teacher, 4, [batch], "ram", folder)
    whole = torchvision.models.wide_resnet50_2().eval().to(memory_format=torch.channels_last)

    def with_gradients():
        """The teacher as public code of RD runs it: layer4 too, and gradients of its weights; its
        optimiser is not fused."""
        stem = whole.maxpool(whole.relu(whole.bn1(whole.conv1(batch))))
        f1 = whole.layer1(stem)
        f2 = whole.layer2(f1)
        f3 = whole.layer3(f2)
        whole.layer4(f3)
        whole.zero_grad(set_to_none=True)
        return [f1, f2, f3]

    def step(encode, fused=True):
        optimizer = torch.optim.AdamW(detector.student.parameters(), 2e-3, amsgrad=True,
                                      fused=fused)

        def work():
            detector.train()
            optimizer.zero_grad(set_to_none=True)
            detector(encode()).backward()
            optimizer.step()

        return work

    work = {"cached": step(lambda: cache.load([0, 1, 2, 3], device)),
            "off": step(lambda: teacher(batch)),
            "public": step(with_gradients, fused=False)}
    macs = {name: gmac(function) for name, function in work.items()}
    t = in_turn(**work)
    for name, what, target in (("cached", "cached", 1.7), ("off", "--cache off", 1.4)):
        report(f"RevDist step, WideResNet50-2, batch 4: as in public code / {what}",
               f"{t['public'] / t[name]:.2f} x", f"at least {target} x (by multiply-adds "
               f"{macs['public'] / macs[name]:.2f} x)")
    bench_evaluation("RevDist, WideResNet50-2", cada, detector, images, device, 4)


def bench_evaluation(name, script, detector, images, device, batch_size) -> None:
    batches = list(script.image_loader(images, device, 0, batch_size=batch_size))

    def teacher():
        for x in batches:
            detector.teacher(x)

    @torch.no_grad()
    def evaluation():
        encoded = (detector.teacher(x) for x in script.image_loader(images, device, 0,
                                                                    batch_size=batch_size))
        script.image_score(script.smooth(script.describe_all(detector, encoded)[1]))

    @torch.no_grad()
    def networks():
        for x in batches:
            detector.describe(detector.teacher(x))

    bound = gmac(networks) / gmac(teacher)
    t = in_turn(teacher=teacher, evaluation=evaluation)
    report(f"evaluation / the teacher's forward alone, {name}",
           f"{t['evaluation'] / t['teacher']:.2f} x", f"at most 1.5 x (by multiply-adds "
           f"{bound:.2f} x); {len(images) / t['evaluation']:.1f} images a second")


def relabelling_loop(maps: np.ndarray, masks: np.ndarray, thresholds: int = 200) -> float:
    """AUPRO as it is often computed: at each threshold each mask is labelled again."""
    pro, fpr = [], []
    for threshold in np.linspace(maps.min(), maps.max(), thresholds):
        flagged, overlaps = maps > threshold, []
        for f, mask in zip(flagged, masks):
            labelled, n = ndimage.label(mask, np.ones((3, 3)))
            overlaps += [f[labelled == k].mean() for k in range(1, n + 1)]
        pro.append(np.mean(overlaps))
        fpr.append(flagged[~masks].mean())
    pro, fpr = np.array(pro[::-1]), np.array(fpr[::-1])
    inside = fpr <= 0.3
    return np.trapezoid(pro[inside], fpr[inside]) / 0.3


def bench_metrics() -> None:
    """Item 3: 80 maps of 256 x 256, half of them with a defect."""
    masks = torch.zeros(80, 256, 256, dtype=torch.bool)
    for i in range(0, 80, 2):
        masks[i, i:i + 40, 60:90] = masks[i, 200:220, 2 * i:2 * i + 20] = True
    generator = torch.Generator().manual_seed(0)
    maps = cada.smooth(torch.rand(80, 256, 256, generator=generator)) + 0.05 * masks
    labels, pixels = masks.flatten(1).any(1).numpy(), masks.flatten().numpy()
    scores, flat = cada.image_score(maps).numpy(), maps.flatten().numpy()

    def ours():
        cada.pixel_metrics(maps, masks)
        cada.image_metrics(scores, labels)

    t = in_turn(ours=ours, loop=lambda: relabelling_loop(maps.numpy(), masks.numpy()),
                sklearn=lambda: (roc_auc_score(pixels, flat),
                                 average_precision_score(pixels, flat)))
    report("200-threshold relabelling loop (AUPRO alone) / all seven metrics",
           f"{t['loop'] / t['ours']:.1f} x", f"at least 10 x; all seven: {t['ours']:.2f} s")
    report("scikit-learn's pixel AUROC and AP / all seven metrics",
           f"{t['sklearn'] / t['ours']:.2f} x", "at least 2 x")
    report("peak memory of the pixel metrics, 5.2 M pixels",
           f"{bytes_a_pixel(80):.0f} bytes a pixel")


def dense_mixture(moe: cnc.GatedMoE, x: torch.Tensor) -> torch.Tensor:
    """The mixture by its formula: every expert computes every token."""
    weights, chosen, probabilities = moe.route(x.flatten(0, 1))
    gate = torch.zeros_like(probabilities).scatter(1, chosen, weights).view(*x.shape[:2], -1)
    return sum(gate[..., k:k + 1] * expert(x) for k, expert in enumerate(moe.experts))


def bench_mixture() -> None:
    """Item 4: 577 tokens x 1024, batch 8, forward and backward."""
    moe, x = cnc.GatedMoE(1024), torch.randn(8, 577, 1024, requires_grad=True)
    t = in_turn(gated=lambda: moe(x)[0].sum().backward(),
                dense=lambda: dense_mixture(moe, x).sum().backward())
    report("mixture of experts: every expert computed / only the chosen",
           f"{t['dense'] / t['gated']:.2f} x", "above 1 x (by multiply-adds 2.50 x)")


def growth(what: str, unit: str, sizes: list[int], function) -> None:
    """Times of function(size), prepared outside the clock, and the exponent that fits them."""
    t = in_turn(**{str(size): function(size) for size in sizes})
    exponent = np.polyfit(np.log(sizes), np.log(list(t.values())), 1)[0]
    print(f"{what:<44}" + "".join(f"{size:>7} {unit} {s:7.3f} s" for size, s in
                                  zip(sizes, t.values())) + f"   exponent {exponent:.2f}",
          flush=True)


def bench_growth(folder: Path) -> None:
    rng, device = torch.Generator().manual_seed(0), torch.device("cpu")
    small = cada.RevDist(cada.Config(**TINY))

    def fill(n):
        images = torch.randn(n, 3, 64, 64, generator=rng)
        return lambda: cada.FeatureCache(small.teacher, n, images.split(8), "ram", folder)

    def revdist(side):
        detector = cada.RevDist(cada.Config(**TINY | {"image_size": side})).train()
        features = detector.teacher(torch.randn(4, 3, side, side, generator=rng))
        return lambda: detector(features).backward()

    def cnc_step(side):
        detector = cnc.CNC(cnc.Config(**CNC_TINY | {"image_size": side})).train()
        features = detector.teacher(torch.randn(4, 3, side, side, generator=rng))
        return lambda: detector(features).backward()

    def fit(n):
        features = torch.randn(n, 16, generator=rng) + 9 * torch.eye(16)[torch.arange(n) % 8]
        maps = torch.rand(n, 16, 16, generator=rng)
        return lambda: cada.CADA(16).fit(features, maps)

    def classes(n):
        names = np.repeat([f"{k:02}" for k in range(n)], 8)
        maps, labels = torch.rand(8 * n, 64, 64, generator=rng), np.tile([0, 1], 4 * n)
        masks = torch.zeros(8 * n, 64, 64, dtype=torch.bool)
        masks[1::2, 20:30, 20:30] = True
        scores = cada.image_score(maps).numpy()
        return lambda: cada.summarise(scores, labels, names, maps, masks, device)

    growth("teacher features of n images", "images", [16, 32, 64, 128], fill)
    growth("CADA.fit (k is sought on 2,000)", "images", [500, 1000, 2000, 4000, 8000], fit)
    growth("RevDist step by image side", "pixels", [64, 128, 256], revdist)
    growth("CNC step by image side (attention: tokens^2)", "pixels", [64, 128, 256], cnc_step)
    growth("all metrics by classes of 8 images", "classes", [8, 16, 32, 64], classes)


def bench() -> None:
    """Print the table; nothing is written. Ratios of things timed in turn, median of five."""
    torch.set_num_threads(os.cpu_count())
    print(f"{os.cpu_count()} CPU cores, PyTorch {torch.__version__}, float32; random weights")
    with TemporaryDirectory() as folder:
        bench_cnc(Path(folder, "cnc"))
        bench_revdist(Path(folder, "revdist"))
        bench_metrics()
        bench_mixture()
        bench_growth(Path(folder))


if __name__ == "__main__":
    if sys.argv[1:] != ["bench"]:
        sys.exit("pytest -q test_smoke.py runs the tests; python test_smoke.py bench the benchmark")
    bench()
