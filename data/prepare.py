"""Make the data sets that need no manual download, as MVTec-style trees.

    python data/prepare.py demo [folder]     # draws 8 classes into data/demo
    python data/prepare.py elpv [folder]     # copies the package elpv-dataset into data/elpv

An image goes render(rng) -> image, object mask -> defect(...) -> image, defect mask -> photograph.
Until saved, images are float RGB arrays (128, 128, 3), nominally in [0, 1], masks are bool arrays.
"""
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SEED = 0
SIZE = 128                   # pixels; all lengths below are in pixels too
MASK_ALPHA = 0.15            # a pixel counts as changed where the defect is at least this opaque
LARGE, SMALL = 0.33, 0.06    # share of the object that a patch-like defect covers
Y, X = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2    # pixel centres, origin in the image centre
EVERYWHERE = np.ones((SIZE, SIZE), bool)          # the object mask of a texture

def cover(distance, soft=1.0):
    """Opacity of a shape given its signed distance (negative inside); soft=1 is anti-aliasing."""
    return np.clip(0.5 - distance / soft, 0, 1)

def box(x, y, width, height, corner=1.0):
    """Opacity of a rounded rectangle centred at the origin of (x, y)."""
    dx, dy = np.abs(x) - width / 2 + corner, np.abs(y) - height / 2 + corner
    return cover(np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) - corner)

def paint(image, colour, alpha):
    """Blend `colour` over `image` with opacity `alpha` (H, W); each is one colour or an image."""
    return image + alpha[..., None] * (np.asarray(colour) - image)

def noise(rng, sigma):
    """Smooth random field (H, W) with mean 0 and variance 1; sigma may be a pair (y, x)."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (field - field.mean()) / field.std()

def on_table(surface, alpha, table):
    """Image and mask of an object that throws a shadow, to its lower right, on a plain table."""
    shade = ndimage.shift(ndimage.gaussian_filter(alpha, 4), (4, 3))
    return paint(table * (1 - 0.45 * shade[..., None]), surface, alpha), alpha > 0.5

# ==== the eight classes: render(rng) -> (image, object mask) ===================================
def grid(rng):
    """Woven wire: the most regular class, only its phase moves by a fraction of a pixel."""
    period, radius = 16, 4.4
    at = np.stack((X + rng.normal(0, 0.3), Y + rng.normal(0, 0.3)))    # upright wires, level wires
    nearest = np.round(at / period)
    # At a crossing the two heights have opposite signs: every wire goes over, under, over, ...
    height = np.cos(np.pi * (at[::-1] / period + nearest + np.reshape((0, 1), (2, 1, 1))))
    offset = at - period * nearest
    lit = np.sqrt(np.clip(1 - (offset / radius) ** 2, 0, 1)) - 0.35 * offset / radius
    upright, level = ((0.22 + 0.5 * lit) * (1 + 0.22 * height))[..., None] * (1.0, 0.93, 0.80)
    a, b = cover(np.abs(offset) - radius)
    image = paint((0.10, 0.11, 0.13), level, b)
    return paint(image, upright, a * np.where(height[0] > height[1], 1, 1 - b)), EVERYWHERE

def fabric(rng):
    """Denim twill: regular weave, but every yarn has its own thickness and shade."""
    u, v = ((axis + 0.5 * noise(rng, 14)) / 5 + rng.uniform(0, 4) for axis in (X, Y))
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    warp_on_top = (column + row) % 4 < 3     # stepping by one each row draws the diagonal ribs
    warp_shade, weft_shade = rng.normal(0, 0.06, (2, 64))
    yarn_shade = np.where(warp_on_top, warp_shade[column], weft_shade[row])
    round_yarn = np.sin(np.pi * (np.where(warp_on_top, u, v) % 1))
    dye = np.array((0.24, 0.34, 0.55)) * rng.normal(1, 0.04)
    image = paint(dye, (0.68, 0.71, 0.76), np.where(warp_on_top, 0.0, 0.55))
    tone = 0.62 + 0.42 * round_yarn + yarn_shade + 0.05 * noise(rng, (4, 0.7))
    return ndimage.gaussian_filter(image * tone[..., None], (0.5, 0.5, 0)), EVERYWHERE

def wood(rng):
    """Streaky grain along y; ring spacing, bend and colour change from board to board."""
    bent = X + 4 * noise(rng, (35, 14)) + rng.uniform(0, 60)
    rings = np.sin(2 * np.pi * bent / rng.uniform(16, 26)) + 0.5 * np.sin(bent / 1.7)
    fibres = 0.20 * noise(rng, (22, 1.0)) + 0.10 * noise(rng, (7, 0.6))
    light_tone = np.array((0.82, 0.62, 0.40)) * rng.normal(1, 0.05)
    dark_tone = np.array((0.46, 0.28, 0.15)) * rng.normal(1, 0.05, 3)
    image = paint(light_tone, dark_tone, np.clip(0.45 + 0.20 * rings + fibres, 0, 1))
    pores = 0.6 * cover(2.1 - noise(rng, (3.5, 0.6)), soft=0.8)
    return paint(image, (0.25, 0.14, 0.08), pores), EVERYWHERE

def granite(rng):
    """Speckle of four minerals in random proportions, sizes and tints: the most random class."""
    minerals = (0.74, 0.72, 0.70), (0.58, 0.55, 0.54), (0.68, 0.55, 0.50), (0.33, 0.32, 0.33)
    fields = [noise(rng, size) + rng.normal(0, 0.10) for size in rng.uniform(1.7, 2.0, 4)]
    share = np.exp(4 * np.stack(fields, -1))      # soft arg-max, so crystals get smooth borders
    share /= share.sum(-1, keepdims=True)
    tint = rng.normal(1, 0.04, 3)
    return share @ (minerals * tint) * (1 + 0.07 * noise(rng, 0.7)[..., None]), EVERYWHERE

def washer(rng):
    """Turned steel ring, always centred: only the highlight and the tool marks differ."""
    x, y = X - rng.normal(0, 0.7), Y - rng.normal(0, 0.7)
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    marks = ndimage.gaussian_filter1d(rng.standard_normal(400), 1.2)
    shine = np.cos(2 * (angle - rng.normal(0.8, 0.12))) ** 3
    tone = 0.56 + 0.14 * shine + 0.05 * np.interp(r * 4, np.arange(400), marks)
    bevel = np.exp(-((r - 47.5) / 1.5) ** 2) - np.exp(-((r - 26.5) / 1.5) ** 2)
    tone += 0.22 * bevel * np.cos(angle + 2.3)   # outer and inner edge face opposite directions
    steel = tone[..., None] * (0.98, 1.0, 1.03)
    return on_table(steel, cover(r - 50) * cover(24 - r), (0.30, 0.33, 0.37))

def pill(rng):
    """Two-coloured capsule in any orientation, lit from the upper left."""
    turn, radius = rng.uniform(0, 2 * np.pi), 23
    x, y = X - rng.normal(0, 1.5), Y - rng.normal(0, 1.5)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    cap = np.sign(u) * np.maximum(np.abs(u) - 25, 0)         # distance into the round ends
    nx = (cap * np.cos(turn) - v * np.sin(turn)) / radius    # surface normal, in image axes
    ny = (cap * np.sin(turn) + v * np.cos(turn)) / radius
    nz = np.sqrt(np.clip(1 - nx ** 2 - ny ** 2, 0, 1))
    diffuse = np.clip(0.75 * nz - 0.42 * nx - 0.50 * ny, 0, 1)[..., None]
    shell = np.array(((0.78, 0.28, 0.20), (0.90, 0.84, 0.70))) * rng.normal(1, 0.015, (2, 1))
    seam = 1 - 0.25 * np.exp(-(u / 1.3) ** 2)[..., None]
    surface = paint(*shell, cover(u)) * seam * (0.42 + 0.62 * diffuse) + 0.45 * diffuse ** 24
    return on_table(surface, cover(np.hypot(cap, v) - radius), (0.52, 0.60, 0.66))

def circuit(rng):
    """Small board with a fixed layout; the parts vary in shade and sit slightly off their pads."""
    x, y = X - rng.normal(0, 0.4), Y - rng.normal(0, 0.4)
    image, mask = on_table((0.10, 0.34, 0.22), box(x, y, 114, 114, 5), (0.62, 0.60, 0.57))
    side = np.abs(x)                              # pins and traces are alike left and right
    for row in range(-18, 19, 6):
        lane = row if row % 12 else row * 2.3     # every second trace fans out to the edge
        height = row + (lane - row) * np.clip((side - 22) / 10, 0, 1)
        trace = cover(np.abs(y - height) - 1, soft=1.2) * box(side - 34, y, 40, 120)
        image = paint(image, (0.30, 0.56, 0.34), trace)
        image = paint(image, (0.80, 0.78, 0.70), box(side - 19, y - row, 7, 2.6))
        image = paint(image, (0.80, 0.66, 0.34), cover(np.hypot(side - 50, y - lane) - 2.4))
    chip = (1 - 0.004 * (X + Y))[..., None] * (0.15, 0.15, 0.17)
    image = paint(image, chip, box(x - rng.normal(0, 0.3), y, 32, 44))
    image = paint(image, (0.32, 0.32, 0.34), cover(np.hypot(x + 10, y + 16) - 2.2))
    for px, py in [(-36, -48), (-12, -48), (12, -48), (36, -48), (-24, 48), (0, 48), (24, 48)]:
        dx, dy = x - px - rng.normal(0, 0.25), y - py - rng.normal(0, 0.25)
        image = paint(image, (0.82, 0.82, 0.80), box(dx, dy, 16, 8))           # solder
        part = np.array((0.62, 0.47, 0.32) if py > 0 else (0.20, 0.21, 0.24)) * rng.normal(1, 0.06)
        image = paint(image, part * (1 - 0.05 * dy[..., None]), box(dx, dy, 10, 8.6))
    return image, mask

def cookie(rng):
    """Irregular outline, random chips and crumb: an object class that is hard to predict."""
    x, y = X - rng.normal(0, 1.5), Y - rng.normal(0, 1.5)
    angle = np.arctan2(y, x)
    waves = [rng.normal(0, 1.8 / k ** 0.5) * np.cos(k * angle + rng.uniform(0, 7))
             for k in range(2, 9)]
    distance = np.hypot(x, y) - rng.normal(48, 1.5) - sum(waves)
    height = 7 * np.clip(-distance / 40, 0, 1) ** 0.5 + 0.5 * noise(rng, 2.5) + 0.28 * noise(rng, 1)
    crust = np.array((0.76, 0.55, 0.32)) * rng.normal(1, 0.03, 3)
    baked = np.clip(np.exp(distance / 7) + 0.15 * noise(rng, 5), 0, 1)     # darker near the rim
    image = paint(crust, 0.62 * crust, baked)
    for _ in range(rng.integers(6, 11)):                                   # lobed chocolate chips
        dy, dx = np.mgrid[:SIZE, :SIZE] - rng.choice(np.argwhere(distance < -7))[:, None, None]
        lobes = np.sin(rng.integers(2, 5) * np.arctan2(dy, dx) + rng.uniform(0, 7))
        chip = cover(np.hypot(dy, dx) - rng.uniform(3, 5.5) * (1 + 0.15 * lobes), soft=1.5)
        image, height = paint(image, (0.26, 0.15, 0.10), chip), height + 1.2 * chip
    slope = sum(ndimage.gaussian_filter(height, 0.6, order=order) for order in ((0, 1), (1, 0)))
    return on_table(image * (1 + 0.36 * slope)[..., None], cover(distance), (0.80, 0.79, 0.75))

# ==== the defects: defect(image, object mask, rng, strength) -> (image, defect mask) ===========
def blend(image, changed, alpha):
    """Lay `changed` over the image; the mask is where the defect is opaque enough to count."""
    return paint(image, changed, alpha), alpha > MASK_ALPHA

def patch(target, rng, share, soft, centres=None):
    """Opacity of a ragged patch that covers about `share` of the target's pixels."""
    cy, cx = rng.choice(np.argwhere(target if centres is None else centres))
    score = np.hypot(Y - Y[cy, cx], X - X[cy, cx]) + 4 * noise(rng, 7)
    return cover(score - np.quantile(score[target], share), soft) * target

def line(target, rng, length, width, wander):
    """Opacity of a thin line centred inside the target; `wander` bends it (radians a step)."""
    middle = rng.choice(np.argwhere(ndimage.binary_erosion(target, iterations=8)))[::-1]
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, int(length / 2)))
    points = 2 * np.cumsum(np.stack([np.cos(heading), np.sin(heading)], -1), 0)
    points += middle - points.mean(0)
    canvas = Image.new("L", (4 * SIZE, 4 * SIZE))            # drawn at 4x, then averaged
    ImageDraw.Draw(canvas).line([tuple(p) for p in 4 * points], fill=255, width=round(4 * width))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255 * target

def scratch(image, target, rng, strength):
    """Hair-thin bright or dark line, relative to the local colour so that it fits any class."""
    alpha = line(target, rng, rng.uniform(40, 80), rng.uniform(1.2, 2.0), wander=0.12)
    local = ndimage.gaussian_filter(image, (2, 2, 0))
    return blend(image, local * (1 + strength * rng.choice((-1, 1))), alpha)

def fibre(image, target, rng, strength):
    """Curled foreign fibre, in a grey that stands off from the local colour by `strength`."""
    alpha = line(target, rng, rng.uniform(35, 60), 2.2, wander=0.35)
    local = ndimage.gaussian_filter(image, (3, 3, 0)).mean(-1, keepdims=True)
    return blend(image, local + strength * np.where(local < 0.5, 1, -1), alpha)

def pits(image, target, rng, strength):
    """A few small holes, dark with a lit lower right rim."""
    inside = np.argwhere(ndimage.binary_erosion(target, iterations=6))
    distances = [np.hypot(Y - Y[cy, cx], X - X[cy, cx]) - rng.uniform(2, 5)
                 for cy, cx in rng.choice(inside, rng.integers(2, 5))]
    alpha = cover(np.min(distances, 0), soft=2.0) * target
    rim = ndimage.shift(alpha, (-1.5, -1.5), order=1) - alpha
    return blend(image, image * (1 - strength * (1 + rim))[..., None], alpha)

def stain(image, target, rng, strength, share=SMALL, soft=5):
    """Brownish tint that leaves the texture visible; `soft` is the width of its border."""
    rust = image * (1 + strength * np.array((-0.3, -0.6, -1.0)))
    return blend(image, rust, patch(target, rng, share, soft))

def melt(image, target, rng, strength):
    """A third of the object loses its texture: blurred by `strength` pixels."""
    flat = ndimage.gaussian_filter(image, (strength, strength, 0))
    return blend(image, flat, patch(target, rng, LARGE, soft=10))

def turned(image, target, rng, strength):
    """A third of the texture runs at a right angle to the rest; `strength` is the opacity."""
    return blend(image, np.rot90(image), strength * patch(target, rng, LARGE, soft=4))

def bite(image, target, rng, strength):
    """Missing piece: the background shows through at the rim of the object."""
    rim = target & ~ndimage.binary_erosion(target, iterations=2)
    background = np.median(image[~target], 0)
    return blend(image, background, patch(target, rng, SMALL * strength, soft=2, centres=rim))

def missing(image, target, rng, strength):
    """Part not mounted: what stands out from the board's colour, save its rim, is painted over."""
    board = np.median(image[target], 0)
    part = ndimage.binary_erosion(target, iterations=3) & (np.abs(image - board).max(-1) > 0.1)
    area = patch(target, rng, SMALL * strength, soft=2, centres=part)
    return blend(image, board, area * ndimage.binary_dilation(part))

def bend(image, target, rng, strength):
    """Local displacement by up to `strength` pixels; colours and texture stay as they are."""
    amount, turn = patch(target, rng, 2 * SMALL, soft=14), rng.uniform(0, 2 * np.pi)
    at = np.mgrid[:SIZE, :SIZE] + np.multiply.outer((np.sin(turn), np.cos(turn)), strength * amount)
    moved = [ndimage.map_coordinates(image[..., c], at, order=1, mode="mirror") for c in range(3)]
    return np.stack(moved, -1), amount > MASK_ALPHA

def wrong_half(image, target, rng, strength):
    """One half replaced by the other, turned by 180 degrees; `strength` is the opacity."""
    pixels = np.argwhere(target) * (1.02, 1)     # a square board has no long axis: choose y
    long_axis = np.linalg.eigh(np.cov(pixels.T))[1][:, 1] * rng.choice((-1, 1))
    along = Y * long_axis[0] + X * long_axis[1]
    alpha = strength * cover(along - np.median(along[target])) * target
    return blend(image, np.rot90(image, 2), alpha)

CLASSES = {   # name: (render, uneven light, sensor noise, {defect: (function, strength, ...)})
    "grid": (grid, 0.01, 0.008, {"cut": (scratch, 0.25), "oil": (stain, 0.15),
                                 "bent": (bend, 1.6), "melted": (melt, 1.0)}),
    "fabric": (fabric, 0.02, 0.012, {"pulled": (scratch, 0.7), "stain": (stain, 0.40),
                                     "lint": (fibre, 0.25), "worn": (melt, 1.8)}),
    "wood": (wood, 0.03, 0.012, {"scratch": (scratch, 0.8), "stain": (stain, 0.65),
                                 "hole": (pits, 0.9), "inlay": (turned, 1.0)}),
    "granite": (granite, 0.02, 0.012, {"crack": (scratch, 0.8), "stain": (stain, 0.8),
                                       "pit": (pits, 0.9), "weathered": (stain, 0.6, LARGE, 10)}),
    "washer": (washer, 0.02, 0.008, {"scratch": (scratch, 0.40), "chipped": (bite, 1.0),
                                     "fibre": (fibre, 0.2), "rust": (stain, 0.2, LARGE, 10)}),
    "pill": (pill, 0.02, 0.008, {"crack": (scratch, 0.7), "chipped": (bite, 1.5),
                                 "fibre": (fibre, 0.35), "wrong_half": (wrong_half, 1.0)}),
    "circuit": (circuit, 0.02, 0.010, {"cut": (scratch, 0.9), "missing": (missing, 2.0),
                                       "bridge": (fibre, 0.45), "wrong_half": (wrong_half, 1.0)}),
    "cookie": (cookie, 0.02, 0.012, {"crack": (scratch, 0.9), "bite": (bite, 2.5),
                                     "fibre": (fibre, 0.40), "burnt": (stain, 0.6, LARGE, 10)}),
}

def photograph(image, rng, light, sensor):
    """What the camera adds to good and defective alike: exposure, uneven light, sensor noise."""
    gain = 1 + light * (rng.normal() + (rng.normal() * X + rng.normal() * Y) / SIZE)
    noisy = image * gain[..., None] + sensor * rng.standard_normal(image.shape)
    return Image.fromarray((255 * np.clip(noisy, 0, 1)).round().astype(np.uint8))

def write_class(root, name, seed=SEED):
    """Draw one class. Every image has its own generator, so no image depends on another."""
    render, light, sensor, defects = CLASSES[name]
    splits = {"train/good": 40, "test/good": 16} | {f"test/{kind}": 4 for kind in defects}
    for split_index, (split, count) in enumerate(splits.items()):
        images, masks = root / name / split, root / name / "ground_truth" / Path(split).name
        images.mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([seed, list(CLASSES).index(name), split_index, i])
            image, mask = render(rng)
            if images.name in defects:
                defect, *settings = defects[images.name]
                image, mask = defect(image, mask, rng, *settings)
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).convert("L").save(masks / f"{i:03d}_mask.png", optimize=True)
            photograph(image, rng, light, sensor).save(images / f"{i:03d}.jpg", quality=88)

def make_demo(root):
    """Draw the demo set (8 classes, 576 images)."""
    for name in CLASSES:
        write_class(root, name)

def make_elpv(root):
    """Lay out the solar cells (2 classes, 2,223 images); a quarter of the normal ones is tested."""
    source = Path(importlib.util.find_spec("elpv_dataset").origin).parent / "data"
    rows = sorted(row.split() for row in (source / "labels.csv").read_text().splitlines())
    for index, kind in enumerate(("mono", "poly")):
        normal, defective = ([source / name for name, *label in rows if label == [chance, kind]]
                             for chance in ("0.0", "1.0"))     # 1/3 and 2/3 are left out
        shuffled = np.random.default_rng([SEED, index]).permutation(normal)
        test, train = np.split(shuffled, [len(normal) // 4])
        splits = {"train/good": train, "test/good": test, "test/defective": defective}
        for split, files in splits.items():
            (root / kind / split).mkdir(parents=True)
            for file in files:
                (root / kind / split / file.name).write_bytes(file.read_bytes())
    print("ELPV is licensed CC BY-NC-SA 4.0: non-commercial use only, never commit these images")

def main():
    """Run one command; what the user can repair ends in one line and exit code 2."""
    command, *more = sys.argv[1:] or [""]
    make = {"demo": make_demo, "elpv": make_elpv}.get(command)
    folder = Path(more[0]) if more else Path(__file__).resolve().parent / command
    if make is None or len(more) > 1:
        problem = "usage: python data/prepare.py demo|elpv [folder]"
    elif folder.exists() and any(folder.iterdir()):
        problem = f"{folder} is not empty: delete it or name another folder"
    elif command == "elpv" and importlib.util.find_spec("elpv_dataset") is None:
        problem = "package elpv-dataset is not installed: pip install elpv-dataset"
    else:
        return make(folder)
    print(problem, file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
