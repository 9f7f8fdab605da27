"""Does it do what it says? Run with `pytest -q`: no GPU, no network, no data set needed, 2 minutes
on two CPU cores. `python test_smoke.py bench` measures instead.

In four parts: the papers' methods, the metrics, the scripts as a user runs them, bad input. Scripts
run on a made data set of two classes; what both share is tested in cada.py.
"""
import csv
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cada
import cnc

HERE = Path(__file__).resolve().parent
DEMO = HERE / "data/demo"
SHORT = "--image-size 64 --weights none --batch-size 4 --holdout 0.15 --workers 0 --device cpu"
FLAGS = {cada: f"{SHORT} --teacher resnet18 --iters 4".split(),
         cnc: f"{SHORT} --teacher tiny --epochs 2 --theta 1".split()}  # six steps, three of warm-up
TINY = {cada: dict(image_size=64, teacher="resnet18", weights="none", device="cpu", workers=0),
        cnc: dict(image_size=64, teacher="tiny", weights="none", device="cpu", workers=0)}
DETECTORS = {cada: cada.RevDist, cnc: cnc.CNC}
VARIANTS = {cada: ["raw", "oracle", "cada"], cnc: ["text", "cnc"]}
BOTH = pytest.mark.parametrize("script", [cada, cnc], ids=["cada", "cnc"])
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it gains


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


SAVE = torch.save


def run(script, *words) -> int:
    """The command line, in this process, without what takes longest: pictures, checkpoints."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", lambda self, path, **more: path.write_bytes(b"picture"))
        if torch.save is SAVE:  # else a test has put in another
            m.setattr(torch, "save", lambda content, path: SAVE(
                content if "thresholds" in content else {}, path))
        return script.main([str(w) for w in words])


def rows_of(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path, *names: str) -> np.ndarray:
    """Columns of scores.csv as (rows, columns)."""
    return np.array([[float(row[name]) for name in names] for row in rows_of(out)])


def results(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["results"]


def listing(folder: Path) -> dict[str, int]:
    """The files below a folder with their sizes."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def auroc(scores, labels, classes=None) -> float:
    """Pooled AUROC, or with `classes` the mean over classes."""
    if classes is None:
        return roc_auc_score(labels, scores)
    return np.mean([roc_auc_score(labels[classes == c], scores[classes == c])
                    for c in np.unique(classes)])


def forked(function, *args) -> multiprocessing.Process:
    """Start a function in a process of its own, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def random_images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def weights_of(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
    """Two classes, 7 training and 3 + 3 test images each. Tests that spoil it use `tree`."""
    rng, root = np.random.default_rng(0), session_path / "data"
    for kind, size in (("a", (64, 64)), ("b", (80, 64))):
        for part, count in (("train/good", 7), ("test/good", 3), ("test/hole", 3)):
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


@pytest.fixture(scope="session")
def trained(data, session_path) -> dict:
    """One training run of each script from the shell: its folder and what it printed."""
    def start(script):
        out = session_path / f"trained-{script.__name__}"
        done = subprocess.run(
            [sys.executable, f"{script.__name__}.py", "--data", data, "--out", out, *FLAGS[script]],
            capture_output=True, text=True, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return SimpleNamespace(out=out, checkpoint=out / "checkpoint.pt", stdout=done.stdout,
                               stderr=done.stderr, files=set(listing(out)))

    with ThreadPoolExecutor() as pool:
        return dict(zip((cada, cnc), pool.map(start, (cada, cnc))))


# ==== 1. the papers: RevDist ======================================================================
def millions(*modules) -> float:
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)


def test_parameters_of_wide_resnet50_2():
    """RD's table; layer4 of the teacher, which nothing reads, is not there."""
    with torch.device("meta"):
        student = cada.Student("wide_resnet50_2")
        teacher = cada.Teacher("wide_resnet50_2", "none", 0)
    parts = (student.bottleneck, student.decode3, student.decode2, student.decode1)
    assert [millions(p) for p in parts] == [48.26, 17.84, 5.32, 1.76]
    assert millions(student.fuse1, student.fuse2) == 10.62 and millions(student) == 83.80
    layers = teacher.layer1, teacher.layer2, teacher.layer3
    assert [millions(layer) for layer in layers] == [0.63, 3.48, 20.74]
    assert millions(teacher) == millions(teacher.stem, *layers)


@pytest.mark.parametrize("name, c1", [("wide_resnet50_2", 256), ("resnet18", 64),
                                      ("resnext50_32x4d", 256)])
def test_shapes_of_revdist(name, c1):
    with torch.device("meta"):
        teacher, student = cada.Teacher(name, "none", 0), cada.Student(name)
        encoded = teacher(torch.empty(2, 3, 256, 256))
    shapes = [(2, c1, 64, 64), (2, 2 * c1, 32, 32), (2, 4 * c1, 16, 16)]
    assert [f.shape for f in encoded] == shapes
    assert [d.shape for d in student([f.float() for f in encoded])] == shapes
    fused = torch.empty(2, 12 * c1, 16, 16, device="meta")
    assert student.bottleneck(fused).shape == (2, 512 * c1 // 64, 8, 8)


@pytest.fixture
def revdist() -> cada.RevDist:
    torch.manual_seed(0)
    return cada.RevDist(cada.Config(**TINY[cada]))


def test_gradients_of_revdist_reach_the_student_only(revdist):
    before = weights_of(revdist.teacher)
    revdist.train()(revdist.teacher(random_images(4))).backward()
    assert all(p.grad is None and not p.requires_grad for p in revdist.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in revdist.student.parameters())
    assert same(before, revdist.teacher.state_dict())  # running statistics included


def test_loss_and_map_of_revdist_are_cosine_distances(revdist):
    """And the loss by position ignores the length of a vector, the flat one does not."""
    features = revdist.teacher(random_images(2))
    for sign, distance in ((1, 0.0), (-1, 2.0)):
        revdist.student.forward = lambda encoded, sign=sign: [sign * e for e in encoded]
        assert revdist(features).item() == pytest.approx(3 * distance, abs=1e-4)
        pooled, maps = revdist.describe(features)
        assert pooled.shape == (2, 2 * (64 + 128 + 256)) and maps.shape == (2, 64, 64)
        assert_close(maps, torch.full_like(maps, distance), rtol=0, atol=1e-4)
    revdist.student.forward = lambda encoded: [
        torch.cat([9 * e[..., :1], e[..., 1:]], dim=-1) for e in encoded]
    assert revdist(features).item() > 0.1
    revdist.cfg.loss = "position"
    assert revdist(features).item() == pytest.approx(0, abs=1e-4)


def test_maps_are_blurred_with_sigma_4_at_256_before_or_after_normalising_and_scored_at_the_top():
    point = torch.zeros(1, 256, 256)
    point[0, 128, 128] = 1
    variance = cada.smooth(point)[0].sum(0) @ (torch.arange(256.0) - 128).square()
    assert variance == pytest.approx(16, rel=0.01)
    u, gamma = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.3, 0.9, 1.0])
    maps = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_close(cada.smooth(cada.normalise(maps, u, gamma)),
                 cada.normalise(cada.smooth(maps), u, gamma), rtol=0, atol=1e-4)
    assert cada.image_score(torch.arange(200.0).reshape(1, 10, 20)).tolist() == [198.5]


# ==== 1. the papers: CADA =========================================================================
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
def fitted() -> cada.CADA:
    return cada.CADA.fit(*five_classes(1, 40, anomalous=False)[:2], seed=0)


def test_cada_undoes_the_distortion_of_each_class(fitted):
    """Nearly as well as one who knows the class, and without harm to the order within a class."""
    _, normal_maps, _, of_class = five_classes(1, 40, anomalous=False)
    features, maps, labels, classes = five_classes(2, 40, anomalous=True)
    u, gamma = (torch.stack([m[of_class == c].mean() for c in range(5)])[classes]
                for m in (normal_maps.mean((1, 2)), normal_maps.amax((1, 2))))
    raw, aligned, oracle = (m.amax((1, 2)).numpy() for m in (
        maps, cada.normalise(maps, *fitted.predict(features)), cada.normalise(maps, u, gamma)))
    assert auroc(aligned, labels) > auroc(oracle, labels) - 0.03
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.15
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.02


@pytest.mark.parametrize("groups, expected", [(5, 5), (2, 5), (1, 1)])
def test_as_many_implicit_classes_as_help_to_predict(groups, expected):
    """Five, also where their features lie in two groups, which the eye would see first; one, where
    features tell nothing of the maps."""
    features, maps, _, classes = five_classes(1, 40, anomalous=False)
    features += 50 * torch.eye(64)[classes % 2] * (groups == 2)
    if groups == 1:
        maps = maps[torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))]
    u, gamma = cada.CADA.fit(features, maps).predict(features)
    assert len(u.unique()) == expected


@pytest.mark.parametrize("features, maps", [
    (torch.randn(1, 64), torch.rand(1, 8, 8)), (torch.randn(3, 64), torch.rand(3, 8, 8)),
    (torch.ones(20, 64), torch.rand(20, 8, 8)), (torch.randn(9, 64), torch.zeros(9, 8, 8)),
    (torch.randn(20, 64), torch.full((20, 8, 8), 100.0))],
    ids=["one image", "three images", "equal images", "maps of zeros", "maps without contrast"])
def test_gamma_is_above_u_for_any_images(features, maps):
    strange = [torch.randn(9, 64) * scale for scale in (1, 1e3, -1e6, 0)]
    u, gamma = cada.CADA.fit(features, maps).predict(torch.cat([features, *strange]))
    assert u.isfinite().all() and gamma.isfinite().all() and (gamma > u).all()


def test_an_image_is_aligned_by_itself_and_a_fit_depends_on_its_seed_alone(fitted):
    features, maps, *_ = five_classes(1, 40, anomalous=False)
    u, gamma = fitted.predict(features)
    assert_close(fitted.predict(features[3:4]), (u[3:4], gamma[3:4]))
    torch.manual_seed(99)
    again = cada.CADA.fit(features, maps, seed=0).predict(features)
    assert torch.equal(again[0], u) and torch.equal(again[1], gamma)


def test_a_ruined_patch_hardly_moves_u_and_gamma():
    """A patch of one colour, 3.5 % of a demo image, does not make it another class."""
    train, test = cada.read_mvtec(DEMO)
    train, test = train[::4], [s for s in test if s.label == 0][::4]
    detector = cada.RevDist(cada.Config(**TINY[cada] | {"image_size": 128})).eval()
    normal, images = (cada.load_batch(detector.preprocess, s) for s in (train, test))
    detector.teacher.estimate_statistics(normal.split(16))
    scale = {c: 0.1 * 1.4 ** i for i, c in enumerate(sorted({s.cls for s in train}))}
    noise = torch.rand(len(train), 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = cada.CADA.fit(detector.describe(detector.teacher(normal))[0],
                             torch.tensor([scale[s.cls] for s in train])[:, None, None]
                             * (1 + noise))
        before = head.predict(detector.describe(detector.teacher(images))[0])
        for i, x in enumerate(images):
            x[:, 3 * i:3 * i + 24, 100 - 3 * i:124 - 3 * i] = noise[i, :3, 0, None, None] * 4 - 2
        after = head.predict(detector.describe(detector.teacher(images))[0])
    truth = torch.tensor([1.5 * scale[s.cls] for s in test])
    assert (before[0] / truth - 1).abs().median() < 0.15  # it tells the classes
    for b, a in zip(before, after):
        assert ((a / b - 1).abs() < 0.05).float().mean() >= 0.9  # of the images


def test_a_detector_of_ones_own_is_aligned_as_the_readme_shows(monkeypatch):
    """Its block of Python, word for word."""
    monkeypatch.chdir(HERE)
    names = {}
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    raw, aligned = names["maps"], cada.normalise(names["maps"], *names["cada"].predict(
        names["features"]))
    raw, aligned = (cada.image_score(cada.smooth(m)).numpy() for m in (raw, aligned))
    labels, classes = (np.array([getattr(s, k) for s in names["test"]]) for k in ("label", "cls"))
    assert auroc(aligned, labels) > auroc(raw, labels) + 0.06
    assert auroc(aligned, labels, classes) > auroc(raw, labels, classes) - 0.01


# ==== 1. the papers: CNC ==========================================================================
def cnc_detector(**flags) -> cnc.CNC:
    """In eval mode: dropout would blur every comparison."""
    torch.manual_seed(0)
    return cnc.CNC(cnc.Config(**TINY[cnc] | flags)).eval()


@pytest.fixture(scope="module")
def tokens() -> list[torch.Tensor]:
    """What the teacher says of three images: a float16 tensor (3, 1 + N, C) for each tap."""
    return cnc_detector().teacher(random_images(3))


@pytest.fixture
def on_meta(monkeypatch):
    """open_clip's models without memory or numbers, of any size in no time."""
    create = open_clip.create_model

    def create_on_meta(*args, **more):
        with torch.device("meta"):
            return create(*args, device="meta", **more)

    monkeypatch.setattr(open_clip, "create_model", create_on_meta)


@pytest.mark.parametrize("name, size, patch, taps, width, joint, quick", [
    ("ViT-B-32", 224, 32, [4, 8, 12], 768, 512, False),
    ("ViT-L-14-336", 336, 14, [8, 16, 24], 1024, 768, True)])
def test_shapes_of_cnc(name, size, patch, taps, width, joint, quick, on_meta):
    """Without the mixture, whose routing needs numbers; and the activation of both towers."""
    with torch.device("meta"):
        detector = cnc.CNC(cnc.Config(teacher=name, weights="none", no_moe=True))
        features = detector.teacher(torch.empty(2, 3, size, size))
        encoded, decoded, _ = detector.decode(features)
        text = detector.prompts()
    assert detector.teacher.taps == taps and detector.teacher.size == size
    shape = (2, 1 + (size // patch) ** 2, width)
    assert [(f.shape, f.dtype) for f in features] == [(shape, torch.float16)] * 3
    assert [f.shape for f in encoded] == [d.shape for d in decoded] == [shape] * 3
    assert detector.teacher.joint(encoded[0]).shape == (*shape[:2], joint)
    assert text.shape == (3, 2, joint)
    for tower in (detector.teacher.clip.visual.transformer, detector.teacher.clip.transformer):
        kinds = {type(block.mlp.gelu).__name__ for block in tower.resblocks}
        assert kinds == {"QuickGELU" if quick else "GELU"}


def test_taps_and_joint_space_are_clips():
    """No block after the last tap is run; its CLS, projected, is what CLIP says of the image."""
    images, seen = random_images(2), []
    teacher = cnc.Teacher(cnc.Config(**TINY[cnc] | {"taps": "1,4,5"}))
    teacher.random = False  # as if it were trained: its tokens are CLIP's own
    for block in teacher.clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    found = teacher(images)
    assert len(seen) == 5 and len(found) == 3
    for number, tap in zip((1, 4, 5), found):
        assert torch.equal(tap, seen[number - 1].half())
    teacher.taps = [6]
    expected = F.normalize(teacher.clip.encode_image(images), dim=-1)
    last = teacher.joint(teacher(images)[0].float())[:, 0]
    assert_close(last, expected, rtol=0, atol=2e-3)  # float16


@pytest.mark.parametrize("warm_up", [True, False])
def test_clip_never_changes(warm_up, tokens):
    detector = cnc_detector(tau=1.0).train()
    before = weights_of(detector.teacher)
    assert any("visual" in key for key in before) and any("token_emb" in key for key in before)
    optimizer = torch.optim.Adam((p for p in detector.parameters() if p.requires_grad), 0.1)
    for _ in range(3):
        detector(tokens, warm_up).backward()
        optimizer.step()
    assert same(before, detector.teacher.state_dict()) and detector.student.training
    assert not any(m.training for m in detector.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in detector.teacher.parameters())


@pytest.mark.parametrize("experts, top_k", [(5, 2), (5, 1), (5, 5), (1, 1)])
def test_the_mixture_equals_the_dense_sum_over_all_experts(experts, top_k):
    """And computes only those that were chosen."""
    torch.manual_seed(0)
    moe, x, rows = cnc.GatedMoE(8, experts, top_k), torch.randn(2, 30, 8), []
    logits = moe.gate(x)
    unchosen = logits < logits.topk(top_k).values[..., -1:]
    weights = logits.masked_fill(unchosen, -math.inf).softmax(-1)
    dense = sum(weights[..., k, None] * moe.experts[k](x) for k in range(experts))
    for one in moe.experts:
        one.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    assert_close(moe(x)[0], dense, rtol=0, atol=1e-6)
    assert sum(rows) == top_k * 60


def routed_to(*logits: float) -> cnc.GatedMoE:
    """A mixture of as many experts that sends every token the same way; top_k = 2."""
    torch.manual_seed(0)
    moe = cnc.GatedMoE(8, len(logits), 2)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor(logits))
    return moe


def test_gradients_reach_the_gate_and_the_chosen_experts_and_balance_evens_them():
    """The balance loss is 0 when all experts are used alike."""
    moe, x = routed_to(0, 3, 0, 4, 0), torch.randn(2, 30, 8)
    moe(x)[0].square().sum().backward()
    reached = [any(p.grad is not None and p.grad.any() for p in e.parameters())
               for e in moe.experts]
    assert reached == [False, True, False, True, False] == moe.gate.weight.grad.any(1).tolist()
    losses = [routed_to(favour, 0, 0, 0, 0)(x)[1].item() for favour in (0, 1, 3, 30)]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses)
    assert losses[-1] == pytest.approx(4, abs=1e-3)  # (std / mean)^2 of one in five
    moe = routed_to(3, 1, 0, 0, 0)
    moe(x)[1].backward()
    assert moe.gate.bias.grad[0] > 0 > moe.gate.bias.grad[2]  # descent lowers the favourite


def test_prompts_are_clips_own_words_of_which_the_common_ones_learn():
    teacher = cnc.Teacher(cnc.Config(**TINY[cnc]))
    learner = cnc.PromptLearner(teacher)
    said = teacher.clip.encode_text(teacher.tokenizer(learner.SENTENCES))
    assert learner.SENTENCES[1].replace("damaged ", "") == learner.SENTENCES[0]
    assert_close(learner(), F.normalize(said, dim=-1).expand(3, -1, -1), rtol=0, atol=1e-5)
    learner()[:, 0, 0].sum().backward()  # from one sentence alone
    assert [name for name, _ in learner.named_parameters()] == ["ctx"]
    assert learner.ctx.grad.any(-1).all() and not touched(teacher)


def touched(module) -> bool:
    return any(p.grad is not None and p.grad.any().item() for p in module.parameters())


def test_promotion_draws_normal_patches_together_and_leaves_abnormal_ones():
    """psi in 0..1 grows with the margin, in standard deviations of normal patches."""
    detector, text = cnc_detector(), F.normalize(torch.eye(192)[None, :2].expand(3, -1, -1), dim=-1)
    content, t_n, t_a = torch.eye(192)[[5, 0, 1]]
    e = torch.stack([content + a * t_n + (1 - a) * t_a for a in (0, 0.25, 0.5, 0.75, 1)])
    e = F.normalize(e, dim=-1).expand(3, 1, -1, -1)
    d = F.normalize(e + 0.3 * torch.eye(192)[7], dim=-1)
    detector.track(e, text)
    psi = detector.psi(e, text)
    assert (psi.diff(dim=-1) > 0).all() and psi.min() > 0 and psi.max() < 1
    assert_close(psi[..., 2], torch.full((3, 1), 0.5))  # of the average patch
    nearer = (1 - F.cosine_similarity(e, d, dim=-1)) - detector.distance(e, d, text)
    assert (nearer.diff(dim=-1) > 0).all() and (cnc.promote(e, 0 * psi, text) == e).all()


@pytest.mark.parametrize("tau", [0.001, 0.07, 1.0])
def test_the_constraint_is_a_softmax_over_centred_cosines_at_tau(tau, tokens):
    detector = cnc_detector(tau=tau)
    v, text = detector.patches([t.float() for t in tokens]), detector.prompts().detach()
    detector.track(v, text)
    cosines = torch.einsum("lbnd,lkd->lbnk", v, text).double()
    logits = ((cosines - cosines.mean((1, 2), keepdim=True)) / tau).flatten(0, 2)
    expected = tau * F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    assert detector.constraint(v, text).item() == pytest.approx(expected.item(), rel=1e-3)


def gradients(tokens, warm_up: bool, **flags) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the whole loss: the student's in one vector; the prompts', None where there is none."""
    detector = cnc_detector(**flags)
    detector(tokens, warm_up).backward()
    found = [p.grad.flatten() for p in detector.student.parameters() if p.grad is not None]
    return torch.cat(found), detector.prompts.ctx.grad


def test_the_constraint_teaches_first_the_prompts_and_then_the_decoder(tokens):
    """And without the parts of CNC there is plain reverse distillation in the joint space."""
    (early, ctx), (late, none) = (gradients(tokens, warm_up) for warm_up in (True, False))
    free_early, free_late = (gradients(tokens, w, no_constraint=True)[0] for w in (True, False))
    assert ctx.any() and none is None and torch.equal(early, free_early)
    assert (late - free_late).norm() > 1e-2 * late.norm()
    flags = dict(no_moe=True, no_fnp=True, no_constraint=True)
    detector = cnc_detector(**flags)
    encoded, decoded, _ = detector.decode(tokens)
    expected = torch.stack([1 - F.cosine_similarity(*map(detector.teacher.joint, pair), dim=-1)
                            for pair in zip(encoded, decoded)])[..., 1:].mean().item()
    for warm_up in (True, False):
        assert detector(tokens, warm_up).item() == pytest.approx(expected, abs=1e-6)
        assert gradients(tokens, warm_up, **flags)[1] is None


def test_text_that_means_something_helps():
    """The tiny teacher, made to mean something: in joint space every patch moves along t_a - t_n by
    noise of 0.06 of its length, and those of which a defect covers a tenth by 0.12 more. A part of
    the demo set at 64 x 64. A trained CLIP was not run."""
    normal, test = cnc.read_mvtec(DEMO)
    normal, test = normal[::2], test[::2]
    masks, found = cnc.load_masks(test, 64), []
    for flags in ({}, {"no_fnp": True, "no_constraint": True}):
        detector = cnc_detector(**flags)
        teacher, text = detector.teacher, detector.prompts.start[0]
        images = [cnc.load_batch(detector.preprocess, part) for part in (normal, test)]
        teacher.estimate_statistics(images[0].split(20))
        along = F.normalize(text[1] - text[0], dim=0) @ teacher.clip.visual.proj.T
        defective = F.avg_pool2d(masks[:, None].float(), 16).flatten(1) > 0.1
        generator, moved = torch.Generator().manual_seed(0), []
        for x, shift in zip(images, (0, 0.12 * defective)):
            by = F.pad(0.06 * torch.randn(3, len(x), 16, generator=generator) + shift, (1, 0))
            moved.append([(t + t.norm(dim=-1, keepdim=True) * k[..., None] * along).half()
                          for t, k in zip(map(torch.Tensor.float, teacher(x)), by)])
        optimizer = torch.optim.Adam((p for p in detector.parameters() if p.requires_grad), 1e-3)
        for step, rows in enumerate(cnc.shuffled(len(normal), 8, 160, seed=0)):
            optimizer.zero_grad(set_to_none=True)
            detector.train()([t[rows] for t in moved[0]], warm_up=step < 20).backward()
            optimizer.step()
        with torch.no_grad():
            maps = cnc.smooth(detector.eval().describe(moved[1])[1])
            margin = detector.margin(detector.patches([t.float() for t in moved[1]]),
                                     detector.prompts()).mean(0)
        found.append((cnc.ranking_metrics("P", maps, masks),
                      auroc(-margin.flatten().numpy(), defective.flatten().numpy())))
    (with_text, after), (without, before) = found
    assert with_text["P-AP"] > without["P-AP"] + 0.015
    assert with_text["P-AUROC"] > without["P-AUROC"] + 0.015 and abs(after - before) < 0.005


def test_map_of_cnc_shows_where_the_decoder_fails_and_is_of_its_image_alone(tokens):
    """All patches reproduced but one, the second of its row."""
    detector = cnc_detector(no_fnp=True)
    grid, patch = detector.teacher.grid, 64 // detector.teacher.grid
    row, column = grid // 2, 1
    maps, alone = detector.describe(tokens)[1], detector.describe([t[1:2] for t in tokens])[1]
    assert_close(alone, maps[1:2], rtol=0, atol=1e-5)
    assert maps.min() >= 0 and maps.max() <= 2 and maps.std() > 0

    def fail_at_one_patch(encoded):
        decoded = [e.clone() for e in encoded]
        for d in decoded:
            d[:, 1 + grid * row + column] *= -1
        return decoded, torch.zeros(())

    detector.student.forward = fail_at_one_patch
    maps = detector.describe(tokens)[1]
    y, x = (patch * k + patch // 2 for k in (row, column))  # four pixels share the centre
    assert_close(maps[:, y - 1:y + 1, x - 1:x + 1],
                 maps.amax((1, 2))[:, None, None].expand(3, 2, 2))
    assert maps.amax((1, 2)).min() > 0.3 and maps[:, :y - patch].abs().max() < 1e-4


# ==== 1. the papers: both =========================================================================
@BOTH
def test_a_student_in_bfloat16_is_close_to_one_in_float32(script, monkeypatch):
    """What a GPU runs, as far as a CPU can run it."""
    torch.manual_seed(0)
    detector = DETECTORS[script](script.Config(**TINY[script])).eval()
    features = detector.teacher(random_images(3))
    with torch.no_grad():
        detector(features)  # cnc.py: what margins are normal
        exact, exact_loss = detector.describe(features)[1], detector(features)
        monkeypatch.setattr(script, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
        maps, loss = detector.describe(features)[1], detector(features)
    assert maps.dtype == loss.dtype == torch.float32
    assert not torch.equal(maps, exact)  # else nothing ran in bfloat16
    assert_close(maps, exact, rtol=0, atol=0.04)
    assert_close(loss, exact_loss, rtol=0.02, atol=0.02)


def sgd(parameters, *args, **more) -> torch.optim.SGD:
    """In place of Adam, whose steps do not tell the size of a gradient."""
    return torch.optim.SGD(parameters, 0.01)


def train_a_share(name: str, data: str, out: str, rank: int, port: int) -> None:
    """What one of two processes of torchrun does; the first leaves its weights."""
    script = sys.modules[name]
    script.RANK, script.COUNT = rank, 2
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.optim.Adam = torch.optim.AdamW = sgd
    torch.nn.Dropout.forward = lambda self, x: x  # each process draws its own
    cnc.CNC.track = lambda *args: None  # each process follows its own patches
    torch.manual_seed(0)
    cfg = script.Config(**TINY[script], batch_size=4, out=out, lr=0.01)
    detector = DETECTORS[script](cfg)
    detector.cfg.iters, detector.cfg.epochs, detector.cfg.theta = 2, 2, 1
    script.train_detector(detector, script.read_dataset(Path(data))[0][:12], {})


@forks
@BOTH
def test_two_processes_follow_the_mean_of_their_gradients(script, data, tmp_path, monkeypatch):
    """As one that sees both batches; balance loss and, on CPUs, BatchNorm are of a share."""
    port = 29500 + os.getpid() % 1000 + (script is cnc)
    jobs = [forked(train_a_share, script.__name__, str(data), str(tmp_path), rank, port)
            for rank in (0, 1)]
    assert [job.join(100) or job.exitcode for job in jobs] == [0, 0]
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"]
    monkeypatch.setattr(cnc.CNC, "track", lambda *args: None)
    torch.manual_seed(0)
    detector = DETECTORS[script](script.Config(**TINY[script])).train()
    for m in detector.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0
    images = script.load_batch(detector.preprocess, script.read_dataset(data)[0][:12])
    detector.teacher.estimate_statistics(images.split(4))
    learners = {k: p for k, p in detector.named_parameters() if not k.startswith("teacher.")}
    optimizer, batches = sgd(learners.values()), []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(script, "RANK", rank)
            batches.append(script.shuffled(6, 2, 2 if script is cada else 6, 0))
    for step, both in enumerate(zip(*batches)):
        if script is cada and step == 1:  # past 80 %
            optimizer.param_groups[0]["lr"] *= 0.2
        optimizer.zero_grad()
        for rank, rows in enumerate(both):
            more = {"warm_up": step < 3} if script is cnc else {}
            (detector(detector.teacher(images[rank::2][rows]), **more) / 2).backward()
        optimizer.step()
    for name, p in learners.items():
        assert_close(found[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)


# ==== 2. metrics ==================================================================================
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
    maps = masks * 1.0 if name == "perfect" else maps + 1.5 * masks
    return (maps.round(0) if name == "ties" else maps).astype(np.float32), masks


@pytest.mark.parametrize("name", ["one region", "many regions", "ties", "perfect"])
def test_metrics_equal_scikit_learn_and_the_definition_of_aupro(name):
    maps, masks = pixel_case(name)
    flat = masks.ravel(), maps.ravel()
    for kind in "IP":
        found = cada.ranking_metrics(kind, torch.tensor(maps), torch.tensor(masks))
        expected = {f"{kind}-AUROC": roc_auc_score(*flat), f"{kind}-F1max": f1_max(*flat),
                    f"{kind}-AP": average_precision_score(*flat)}
        expected |= {"AUPRO": brute_aupro(maps, masks)} if kind == "P" else {}
        assert found == pytest.approx(expected, abs=1e-6)
        assert name != "perfect" or found == pytest.approx(dict.fromkeys(expected, 1))


# ==== 3. the scripts: data ========================================================================
GRADIENT = np.add.outer(np.arange(0, 120, 3), np.arange(0, 100, 2)).astype(np.uint8)  # (40, 50)
COLOURS = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=-1)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # how the camera was held
MODES = {  # {what: (image, suffix, the RGB pixels it must be read as)}
    "grey 16 bit png": (Image.fromarray(GRADIENT.astype(np.uint16) * 257), ".png",
                        np.repeat(GRADIENT[..., None], 3, axis=2)),
    "palette": (Image.new("P", (50, 40), 0), ".png", np.full((40, 50, 3), 0)),
    "rgba": (Image.fromarray(np.dstack([COLOURS, GRADIENT])), ".png", COLOURS),
    "turned": (Image.fromarray(np.rot90(COLOURS).copy()), ".png", COLOURS),
    "cmyk jpeg": (Image.new("CMYK", (50, 40), (255, 0, 0, 0)), ".JPG",
                  np.full((40, 50, 3), (0, 255, 255)))}


@pytest.mark.parametrize("what", MODES)
def test_every_kind_of_image_is_read_as_8_bit_rgb(what, tmp_path):
    image, suffix, expected = MODES[what]
    exif = {"exif": TURNED} if what == "turned" else {}
    read = cada.load_image(save(image, tmp_path / ("image" + suffix), **exif))
    assert read.mode == "RGB"
    tolerance = 2 if "jpeg" in what else 0
    np.testing.assert_allclose(np.asarray(read).astype(int), expected, atol=tolerance)


def test_reads_an_mvtec_tree(tree):
    """Masks are paired by stem, hidden files are no images, one class is a set too."""
    masks, images = tree / "a/ground_truth/hole", tree / "a/test/hole"
    (masks / "000_mask.png").rename(masks / "000.png")
    (masks / "002_mask.png").rename(masks / "0_mask.png")
    (images / "002.png").rename(images / "0.PNG")
    for folder in (masks, images, tree / "a/train/good"):
        for name in ("._001.png", "Thumbs.db"):
            (folder / name).write_bytes(b"no image")
    train, test = cada.read_dataset(tree)
    assert [(s.cls, s.label, s.mask) for s in train] == [("a", 0, None)] * 7 + [("b", 0, None)] * 7
    assert [s.label for s in test] == [0, 0, 0, 1, 1, 1] * 2
    assert not any(s.mask for s in test if not s.label)
    pairs = {s.path.name: s.mask.name for s in test if s.cls == "a" and s.mask}
    assert pairs == {"000.png": "000.png", "001.png": "001_mask.png", "0.PNG": "0_mask.png"}
    assert {s.cls for part in cada.read_dataset(tree / "b") for s in part} == {"b"}


@pytest.fixture
def visa(tmp_path) -> Path:
    """A raw VisA tree: JPEGs of 80 x 48, mask values 1-9, one defect of a single pixel."""
    rng, root = np.random.default_rng(1), tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for cls in ("candle", "pcb1"):
        for i in range(8):
            kind, k = ("Normal", i) if i < 5 else ("Anomaly", i - 5)
            path, mask = f"{cls}/Data/Images/{kind}/{k}.JPG", f"{cls}/Data/Masks/Anomaly/{k}.png"
            save(draw(rng, "a", (80, 48), i > 4)[0], root / path)
            lines.append(f"{cls},{'train' if i < 3 else 'test'},"
                         + (f"normal,{path}," if i < 5 else f"anomaly,{path},{mask}"))
            values = np.zeros((48, 80), np.uint8)
            if i == 5:
                values[1, 2] = 1  # falls between the pixels of a 32 x 32 mask
            else:
                values[10:30, 20:60] = rng.integers(1, 10, (20, 40))
            save(Image.fromarray(values), root / mask)
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_reads_a_raw_visa_tree(visa):
    """Masks are binarised, then resized as the image is; a tiny defect keeps its label."""
    train, test = cada.read_dataset(visa)
    assert [(s.cls, s.label) for s in train] == [("candle", 0)] * 3 + [("pcb1", 0)] * 3
    assert [s.label for s in test] == [0, 0, 1, 1, 1] * 2
    assert test[3].mask == visa / "candle/Data/Masks/Anomaly/1.png"
    masks, expected = cada.load_masks(test, 40), torch.zeros(40, 40, dtype=torch.bool)
    assert masks.dtype == torch.bool and masks.shape == (10, 40, 40)
    expected[8:25, 10:30] = True  # rows 10-29 of 48 and columns 20-59 of 80, whatever their value
    assert (masks[3] == expected).all() and not masks[0].any()
    assert not cada.load_masks(test, 32)[2].any()


def settings(script, *words):
    return script.read_command_line([str(w) for w in words], script.Config, "")[2]


def test_defaults_are_the_published_ones_but_small_on_the_demo_set(data, visa):
    real = settings(cada, "--data", data)
    assert (real.teacher, real.weights) == ("wide_resnet50_2", "IMAGENET1K_V1")
    assert (real.image_size, real.batch_size, real.iters, real.lr) == (256, 16, 5000, 2e-3)
    demo = settings(cada, "--data", DEMO, "--batch-size", 7)  # a flag goes before all
    assert (demo.teacher, demo.weights, demo.image_size, demo.batch_size) == (
        "resnet18", "none", 128, 7)
    real = settings(cnc, "--data", data)
    assert (real.teacher, real.weights, real.batch_size) == ("ViT-L-14-336", "openai", 8)
    assert (real.epochs, real.lr, real.tau) == (250, 1e-3, 0.001)
    assert (real.experts, real.top_k, real.theta) == (5, 2, 5)
    assert settings(cnc, "--data", visa).epochs == 200
    assert settings(cnc, "--data", DEMO).teacher == "tiny"


# ==== 3. the scripts: as a user runs them =========================================================
@BOTH
def test_train_writes_and_prints_what_it_says(script, trained):
    done, labels = trained[script], numbers(trained[script].out, "label")[:, 0]
    assert done.files == {"checkpoint.pt", "metrics.json", "scores.csv", "heatmaps.png",
                          *["distributions.png"] * (script is cada)}
    for name in done.files:
        if name.endswith(".png"):
            assert np.asarray(Image.open(done.out / name).convert("L")).std() > 5
    classes = np.array([row["class"] for row in rows_of(done.out)])
    assert list(results(done.out)) == VARIANTS[script]
    for variant, found in results(done.out).items():
        scores = numbers(done.out, variant)[:, 0]
        assert set(found) == {"a", "b", "class mean", "pooled"}
        assert list(found["pooled"]) == ["I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP",
                                         "P-F1max", "AUPRO"]
        assert found["pooled"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        assert found["class mean"]["I-AUROC"] == pytest.approx(auroc(scores, labels, classes))
        assert re.search(rf"^class mean +{variant} ", done.stdout, re.M)
    assert "RANDOM" in done.stderr and "\r" not in done.stderr  # no progress bar in a pipe


@BOTH
def test_eval_repeats_the_numbers_and_predict_gives_its_scores(script, data, trained, tmp_path,
                                                              monkeypatch, capsys):
    done, out = trained[script], tmp_path / "out"
    words = "--checkpoint", done.checkpoint, "--out", out
    assert run(script, "eval", *words, "--batch-size", 5) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == done.stdout.splitlines()[:-1]
    np.testing.assert_allclose(numbers(out, *VARIANTS[script]),
                               numbers(done.out, *VARIANTS[script]), atol=1e-4)
    assert not (out / "checkpoint.pt").exists()
    monkeypatch.setattr(script, "read_dataset", None)  # predict needs none
    paths = data / "b/test", data / "a/test/hole/001.png"
    assert run(script, "predict", *paths, *words) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = {row["path"]: row for row in rows_of(done.out)}
    assert len(told) == 7 and len({row["overlay"] for row in told}) == 7
    for row in told:
        expected = scored[row["path"]]
        assert row["score"] == pytest.approx(float(expected[script.__name__]), abs=1e-4)
        assert str(row["anomalous"]) == expected["anomalous"]
        assert Image.open(row["overlay"]).size == Image.open(row["path"]).size


def test_predict_takes_any_image_and_has_one_fixed_scale(trained, tmp_path, capsys):
    for i, name in enumerate(("grey 16 bit png", "rgba", "cmyk jpeg")):
        save(MODES[name][0], tmp_path / "images" / f"deep/{i}{MODES[name][1]}")
    words = "predict", tmp_path / "images", "--checkpoint", trained[cada].checkpoint
    for threshold, cold in ((1e9, True), (1e-9, False)):  # scaled one by one, both would be hot
        assert run(cada, *words, "--out", tmp_path / "out", "--threshold", threshold) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [Path(row["path"]).name for row in told] == ["0.png", "1.png", "2.JPG"]
        shown = np.asarray(Image.open(told[1]["overlay"]).convert("RGB"))
        assert (shown == COLOURS).all() == cold != told[1]["anomalous"]


@BOTH
def test_neither_the_cache_nor_the_names_of_classes_change_a_score(script, tree, trained, tmp_path):
    """Also: one seed gives one result, the run compared with being another process."""
    (tree / "a").rename(tree / "screws")
    (tree / "b").rename(tree / "washers")
    words = "--data", tree, "--out", tmp_path / "out", *FLAGS[script], "--cache", "off"
    assert run(script, *words) == 0
    assert {row["class"] for row in rows_of(tmp_path / "out")} == {"screws", "washers"}
    np.testing.assert_array_equal(numbers(tmp_path / "out", *VARIANTS[script]),
                                  numbers(trained[script].out, *VARIANTS[script]))
    assert set(listing(tmp_path / "out")) == trained[script].files


def killed_run(name: str, words: list[str]) -> int:
    """kill -9, right after the second checkpoint was saved."""
    script = sys.modules[name]
    save = script.save_checkpoint

    def save_and_die(detector, content):
        save(detector, content)
        if content["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    script.save_checkpoint = save_and_die
    return script.main(words)


@forks
@BOTH
def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, data, trained, tmp_path, fails):
    out = tmp_path / "out"
    words = ["--data", str(data), "--out", str(out), *FLAGS[script]]
    job = forked(killed_run, script.__name__, words)
    assert job.join(100) or job.exitcode == -signal.SIGKILL
    assert set(listing(out)) == {"checkpoint.pt"}  # and no cache
    fails(script, "eval", says=["--resume"])
    assert run(script, "--resume", "--out", out) == 0
    assert results(out) == results(trained[script].out)
    assert rows_of(out) == rows_of(trained[script].out)


def test_control_c_ends_in_one_line(data, tmp_path, monkeypatch, capsys):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cada.RevDist, "forward", press)
    assert run(cada, "--data", data, "--out", tmp_path, *FLAGS[cada]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("cada.py: error: interrupted")


def test_the_threshold_comes_from_images_that_were_kept_back(data, trained):
    """By the seed, whatever the class."""
    content = torch.load(trained[cada].checkpoint, weights_only=True)
    cfg, normal = cada.Config(**content["config"]), cada.read_dataset(data)[0]
    kept, held = cada.hold_out(cfg, normal)
    assert len(held) == 2 and sorted(map(str, kept + held)) == sorted(map(str, normal))
    assert cada.hold_out(cfg, normal) == (kept, held)
    maps = cada.score(cada.build(cfg, content), content, held)["cada"]
    assert content["thresholds"]["cada"] == pytest.approx(  # of two images, the larger
        cada.image_score(maps).max().item(), rel=1e-4)
    cfg.holdout = 0
    assert cada.hold_out(cfg, normal)[1] == cada.hold_out(cfg, normal)[0] == normal


@pytest.mark.parametrize("n, q", [(30, 0.9), (7, 0.75)])
def test_the_conformal_threshold_lets_the_promised_share_pass(n, q):
    """Over many draws, a new normal score lies above the threshold of n with at most 1 - q."""
    cfg, generator = cada.Config(**TINY[cada], quantile=q), torch.Generator().manual_seed(0)
    above = [cada.image_score(x[-1:]).item() > cada.threshold(cfg, x[:-1])
             for x in torch.rand(2000, n + 1, 2, 2, generator=generator)]
    assert 0.8 * (1 - q) < np.mean(above) < 1.1 * (1 - q)


@BOTH
def test_good_images_alone_are_enough_to_train_and_predict(script, tree, tmp_path, capsys):
    for cls in "ab":
        shutil.rmtree(tree / cls / "test")
        shutil.rmtree(tree / cls / "ground_truth")
    out = tmp_path / "out"
    assert run(script, "--data", tree, "--out", out, *FLAGS[script]) == 0
    assert "nothing to evaluate" in capsys.readouterr().out
    assert set(listing(out)) == {"checkpoint.pt"}
    assert run(script, "predict", tree / "a/train/good/000.png", "--out", out) == 0
    assert json.loads(capsys.readouterr().out)["threshold"] > 0


def test_data_may_lack_masks_or_a_kind_of_images_or_known_classes(tree, visa, trained, tmp_path):
    out = tmp_path / "out"
    words = "eval", "--out", out, "--checkpoint", trained[cada].checkpoint, "--data"
    for cls in "ab":
        shutil.rmtree(tree / cls / "ground_truth")
    assert run(cada, *words, tree) == 0  # image metrics only
    expected = results(trained[cada].out)["cada"]["pooled"]
    assert results(out)["cada"]["pooled"] == {k: v for k, v in expected.items() if k[0] == "I"}
    shutil.rmtree(tree / "a/test/good")
    shutil.rmtree(tree / "b/test/good")
    assert run(cada, *words, tree) == 0 and results(out)["cada"]["a"] == {}
    assert run(cada, *words, visa) == 0
    assert list(results(out)) == ["raw", "cada"]  # no oracle


@BOTH
def test_a_teacher_from_a_file_is_used_and_not_copied(script, data, tmp_path):
    torch.manual_seed(5)
    model = torchvision.models.resnet18() if script is cada else cnc_detector(seed=5).teacher.clip
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    flags = [*FLAGS[script], "--weights", tmp_path / "weights.pt", "--out", tmp_path / "out",
             *("--iters 1" if script is cada else "--epochs 1 --taps 1,3 --no-moe").split()]
    assert run(script, "--data", data, *flags) == 0
    content = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert not any(name.startswith("teacher.") for name in content["weights"])
    teacher = script.build(script.Config(**content["config"]), content).teacher
    found = teacher.stem[0] if script is cada else teacher.clip.visual.conv1
    expected = model.conv1 if script is cada else model.visual.conv1
    assert torch.equal(found.weight, expected.weight)
    assert run(script, "eval", "--out", tmp_path / "out") == 0


def test_cada_on_cnc(data, trained, tmp_path, monkeypatch, capsys):
    """It leaves a trained detector as it is; and eval, predict and --resume work."""
    monkeypatch.chdir(tmp_path)
    on_cnc, out, before = ["--base", "cnc"], Path("runs/cada"), listing(trained[cnc].out)
    with monkeypatch.context() as m:
        m.setattr(cnc.CNC, "forward", lambda *args, **more: pytest.fail("it trained"))
        assert run(cada, *on_cnc, "--checkpoint", trained[cnc].checkpoint) == 0
    assert listing(trained[cnc].out) == before
    np.testing.assert_array_equal(numbers(out, "raw"), numbers(trained[cnc].out, "cnc"))
    assert run(cada, *on_cnc, "--data", data, "--out", "fresh", *FLAGS[cnc]) == 0
    for words in ([], ["eval", "--out", out], ["--resume", "--out", out]):
        assert not words or run(cada, *words, *on_cnc) == 0
        assert rows_of(out) == rows_of(Path("fresh"))
    capsys.readouterr()
    assert run(cada, "predict", *on_cnc, "--out", out, data / "a/test/hole/000.png") == 0
    told, row = json.loads(capsys.readouterr().out), rows_of(out)[3]
    assert told["score"] == pytest.approx(float(row["cada"]), abs=1e-3)


@BOTH
def test_help_names_every_flag_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(script.Config):
        assert f"--{f.name.replace('_', '-')} " in text
    assert "anew in every step [ours] D2 (default: on)" in text  # a comment of two lines


# ==== 3. the scripts: what the README says ========================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCES = [(HERE / name).read_text(encoding="utf-8") for name in ("cada.py", "cnc.py")]


def test_the_readme_is_short_and_names_every_departure_and_files_that_are_there():
    tags = re.findall(r"\[ours\](?:\s+(D\d+|Dn))?", "".join(SOURCES))  # Dn: explained there
    ledger = re.findall(r"^\|(D\d+)\|", README, re.M)
    assert "" not in tags and ledger == [f"D{i + 1}" for i in range(len(ledger))]
    assert set(tags) - {"Dn"} == set(ledger)
    assert len(README.split()) <= 1300
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / link).is_file(), link


def test_every_command_of_the_readme_runs(tree, tmp_path, monkeypatch, capsys):
    """Word for word, on a tiny data set with tiny defaults; but those that CI runs as they are."""
    for name in ("mvtec", "mine"):
        shutil.copytree(tree, tmp_path / "data" / name)
    for name in ("photo.jpg", "folder/1.png"):
        save(Image.fromarray(COLOURS), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for script, tiny in ((cada, {"iters": 2, "batch_size": 4}), (cnc, {"epochs": 1})):
        defaults = {f.name: f.default for f in fields(script.Config)} | TINY[script] | tiny
        monkeypatch.setattr(script.Config.__init__, "__defaults__", tuple(defaults.values()))
    blocks = re.findall(r"^ *```\n(.*?)```", README, re.M | re.S)
    commands = [line.strip() for line in "".join(blocks).splitlines()
                if line.strip().startswith(("python ", "pytest ", "pip "))]
    in_ci = [line for line in commands if f'run "{line}"' in (HERE / ".ci/run").read_text()]
    assert len(in_ci) == 3 and len(commands) > 8
    for line in commands:
        if line not in in_ci:
            script, *words = shlex.split(line)[1:]
            assert run({"cada.py": cada, "cnc.py": cnc}[script], *words) == 0, line
    assert capsys.readouterr().out.count('"overlay"') == 2


def test_the_scripts_share_sections_letter_for_letter_and_import_nothing_of_each_other():
    shared = [re.findall(r"^# ==== shared: (.+?)\n(.*?)^# ==== end shared$", source, re.M | re.S)
              for source in SOURCES]
    assert len(shared[0]) == SOURCES[0].count("==== end shared") >= 6
    for (name, ours), (other, theirs) in zip(*shared):
        assert (name, ours) == (other, theirs), f"the copies of {name!r} differ"
    imports = [re.findall(r"^ *(?:import|from) (?:cada|cnc)\b.*", s, re.M) for s in SOURCES]
    assert imports == [["            import cnc as base"], []]  # --base cnc, in main()


# ==== 4. bad input ================================================================================
@pytest.fixture
def fails(tmp_path, capsys):
    """The command line ends with exit code 2, one line, and nothing new in tmp_path/out."""
    def check(script, *words, says):
        before = listing(tmp_path / "out")
        code = run(script, *words, "--out", tmp_path / "out")
        lines, name = capsys.readouterr().err.splitlines(), f"{script.__name__}.py: error: "
        assert code == 2
        assert [line for line in lines if line.startswith(name)] == lines[-1:]
        assert not any("Traceback" in line for line in lines)
        for word in says:
            assert word in lines[-1]
        assert listing(tmp_path / "out") == before

    return check


MASK, IMAGE = "a/ground_truth/hole/001_mask.png", "a/test/hole/001.png"
BAD_DATA = {  # what is done to a data set; what the one line says
    "no folder": (lambda t: shutil.rmtree(t), ["--data", "no such folder"]),
    "an empty folder": (lambda t: (shutil.rmtree(t), t.mkdir()), ["--data", "no training images"]),
    "a class without training images": (
        lambda t: [p.unlink() for p in (t / "a/train/good").iterdir()], ["a/train/good"]),
    "no image": (lambda t: (t / "a/train/good/003.png").write_text("text"), ["good/003.png"]),
    "half an image": (lambda t: (t / IMAGE).write_bytes((t / IMAGE).read_bytes()[:-900]), [IMAGE]),
    "a mask without image": (lambda t: (t / IMAGE).unlink(), ["ground_truth/hole", "hole/001"]),
    "an image without mask": (lambda t: (t / MASK).unlink(), ["ground_truth/hole", "hole/001"]),
    "a mask of a misspelled kind": (
        lambda t: save(Image.new("L", (64, 64)), t / "a/ground_truth/hoel/0_mask.png"), ["hoel/0"]),
    "a mask of another size": (
        lambda t: save(Image.new("L", (64, 80)), t / MASK), [MASK, "64 x 64"]),
    "no mask": (lambda t: (t / MASK).write_text("text"), [MASK])}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(what, tree, fails):
    spoil, says = BAD_DATA[what]
    spoil(tree)
    fails(cada, "--data", tree, *FLAGS[cada], says=says)


BAD_WORDS = {  # command line: what the one line says, if not the last word
    cada: {
        "explain": "predict", "train data/mvtec": 0, "predict": 0, "--frobnicate 3": "--frobnicate",
        "--iters ten": 0, "--iters 0": 0, "--batch-size -4": 0, "--lr nan": 0, "--seed -1": 0,
        "--quantile 9": 0, "--image-size 100": 0, "--holdout 1": 0, "--cache tape": 0,
        "--loss mse": 0, "--base unet": "cnc", "--base cnc --iters 3": "--iters",
        "DATA --device abacus": "--device abacus", "DATA --teacher vgg16": "--teacher vgg16",
        "DATA --weights IMAGENET1K_V9": "--weights IMAGENET1K_V9",
        "DATA --weights MALICIOUS": "malicious.pt", "predict x.png MALICIOUS": "malicious.pt",
        "--checkpoint nowhere.pt": 0, "--resume": "checkpoint.pt", "eval": "checkpoint.pt",
        "predict no --workers 2 TRAINED": "error: cannot", "predict EMPTY TRAINED": "no images",
        "eval --iters 96 TRAINED": "--iters", "predict x.png --threshold 0 TRAINED": "--threshold",
        "predict x.png --data DATA TRAINED": "--data", "--resume --batch-size 8 TRAINED": "--batch",
        "eval OTHER": "--base", "eval --base cnc OTHER": "no CADA"},
    cnc: {
        "--epochs 0": 0, "--taps two,4": 0, "--top-k 6": 0, "--experts 0": "--top-k",
        "--theta -1": 0, "--tau 0": 0, "--iters 5": "--iters",
        "DATA --taps 7": "--taps 7", "DATA --taps 4,2": "rising",
        "DATA --image-size 70": "multiples of 16", "DATA --teacher vgg16": "ViT-B-16",
        "DATA --weights openai": "--weights openai", "DATA --teacher RN50": "plain ViT",
        "DATA --teacher ViT-B-16-SigLIP --image-size 224": "SigLIP",
        "DATA --weights MALICIOUS": "malicious.pt", "eval MALICIOUS": "malicious.pt",
        "eval --no-moe TRAINED": "--no-moe", "eval OTHER": "--base"}}


class Payload:
    """A pickle of it, when loaded, creates a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("script, words", [(s, w) for s in BAD_WORDS for w in BAD_WORDS[s]],
                         ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_bad_command_lines(script, words, data, trained, tmp_path, on_meta, fails):
    """TRAINED: a checkpoint; OTHER: one of the other script; MALICIOUS: one that would run code."""
    ran, malicious, empty = (tmp_path / name for name in ("ran", "malicious.pt", "empty"))
    malicious.write_bytes(pickle.dumps({"config": Payload(ran)}, protocol=2))
    empty.mkdir()
    flag, other = "--checkpoint", trained[cnc if script is cada else cada].checkpoint
    places = {"TRAINED": [flag, trained[script].checkpoint], "OTHER": [flag, other],
              "MALICIOUS": [malicious] if "--weights" in words else [flag, malicious],
              "DATA": ["--data", data, *FLAGS[script]], "EMPTY": [empty]}
    given = sum((places.get(w, [w]) for w in words.split()), [])
    fails(script, *given, says=[BAD_WORDS[script][words] or words.split()[-1]])
    assert not ran.exists()
    with open(malicious, "rb") as file:
        pickle.load(file)
    assert ran.exists()  # so the payload works


def nan_loss(script, monkeypatch, tmp_path):
    loss = DETECTORS[script].forward
    monkeypatch.setattr(DETECTORS[script], "forward", lambda *a, **k: loss(*a, **k) * math.nan)
    return [], ["loss", "nan", "--lr"]


def no_gpu(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return ["--device", "cuda"], ["--device cuda"]


def full_disk(script, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    return [], ["--cache", "GiB"]


def full_disk_for_the_checkpoint(script, monkeypatch, tmp_path):
    def fill(content, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", fill)
    return [], ["checkpoint.pt", "No space left"]


def out_is_a_file(script, monkeypatch, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    return [], [str(tmp_path / "out")]


def weights_that_do_not_fit(script, monkeypatch, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    return ["--weights", tmp_path / "weights.pt"], [f"--weights {tmp_path / 'weights.pt'}"]


def no_network(script, monkeypatch, tmp_path):
    def download(*args, **more):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # what was downloaded before must not help
    monkeypatch.setattr(torch.hub, "urlopen", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    words = {cada: ["--weights", "IMAGENET1K_V1"],
             cnc: ["--teacher", "ViT-B-32", "--image-size", 224, "--weights", "openai"]}[script]
    return words, [f"--weights {words[-1]}", "Name or service", "none"]


@BOTH
@pytest.mark.parametrize("spoil", [
    nan_loss, no_gpu, full_disk, full_disk_for_the_checkpoint, out_is_a_file,
    weights_that_do_not_fit, no_network], ids=lambda f: f.__name__)
def test_a_run_that_cannot_go_on(script, spoil, data, tmp_path, monkeypatch, fails):
    words, says = spoil(script, monkeypatch, tmp_path)
    fails(script, "--data", data, *FLAGS[script], *words, says=says)


# ==== benchmark: python test_smoke.py bench =======================================================
def in_turn(repeats: int = 5, **work) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that noise of the machine hits all."""
    seconds = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, function in work.items():
            began = time.perf_counter()
            function()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def bench_training(script, teacher: str, side: int, size: int, folder: Path) -> None:
    """A training step with the cache, with the same in memory, and with --cache off."""
    detector = script.build(script.Config(teacher=teacher, weights="none", workers=0, device="cpu",
                                          out=str(folder), batch_size=size), {})
    samples = [script.Sample(save(draw(np.random.default_rng(i), "a", (side, side), False)[0],
                                  folder / f"{side}-{i}.png")) for i in range(2 * size)]
    optimizer = torch.optim.Adam((p for p in detector.parameters() if p.requires_grad), 1e-3,
                                 fused=True)

    def step(features):
        for batch in features([[*range(size)], [*range(size, 2 * size)]]):
            optimizer.zero_grad(set_to_none=True)
            detector(batch).backward()
            optimizer.step()

    sources, memmap = {"on": script.teacher_features(detector, samples)}, np.memmap
    np.memmap = lambda *args, **more: np.array(memmap(*args, **more))
    sources["memory"], np.memmap = script.teacher_features(detector, samples), memmap
    detector.cfg.cache = "off"
    sources["off"] = script.teacher_features(detector, samples)
    t, macs = in_turn(**{k: lambda f=f: step(f) for k, f in sources.items()}), {}
    for name in ("on", "off"):
        with FlopCounterMode(display=False) as counter:
            step(sources[name])
        macs[name] = counter.get_total_flops()
    print(f"{teacher}, step: --cache off / on {t['off'] / t['on']:.2f} (by multiply-adds "
          f"{macs['off'] / macs['on']:.2f}), cache in memory / on {t['memory'] / t['on']:.2f}")


PEAK = """
import re, cada, torch
peak = lambda: int(re.search("VmHWM: *\\t(.*) kB", open("/proc/self/status").read())[1])
masks = torch.zeros(200, 256, 256, dtype=torch.bool)
masks[::2, 100:172, 90:218] = True  # 7 % of all pixels
maps, before = torch.rand(masks.shape), peak()
cada.ranking_metrics("P", maps, masks)
print(f"pixel metrics: {1024 * (peak() - before) / maps.numel():.1f} bytes a pixel at the peak")
"""


def bench_metrics() -> None:
    """80 maps of 256 x 256, half of them with a defect."""
    masks = torch.zeros(80, 256, 256, dtype=torch.bool)
    for i in range(0, 80, 2):
        masks[i, i:i + 40, 60:90] = masks[i, 200:220, 2 * i:2 * i + 20] = True
    maps = cada.smooth(torch.rand(80, 256, 256, generator=torch.Generator().manual_seed(0)))
    maps += 0.05 * masks
    pixels, flat = masks.flatten().numpy(), maps.flatten().numpy()
    t = in_turn(ours=lambda: cada.ranking_metrics("P", maps, masks),
                sklearn=lambda: (roc_auc_score(pixels, flat),
                                 average_precision_score(pixels, flat)))
    print(f"scikit-learn's pixel AUROC and AP / all pixel metrics {t['sklearn'] / t['ours']:.1f}")
    subprocess.run([sys.executable, "-c", PEAK], cwd=HERE)


if __name__ == "__main__":
    if sys.argv[1:] != ["bench"]:
        sys.exit("pytest -q test_smoke.py runs the tests; python test_smoke.py bench the benchmark")
    torch.set_num_threads(os.cpu_count())
    print(f"{os.cpu_count()} CPU cores, PyTorch {torch.__version__}; ratios of medians of five")
    with TemporaryDirectory() as temporary:
        bench_training(cnc, "ViT-B-16", 224, 8, Path(temporary))
        bench_training(cada, "wide_resnet50_2", 256, 4, Path(temporary))
    bench_metrics()
