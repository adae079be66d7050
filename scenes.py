"""Scenes as data.py has them, drawn: a coloured digit, or two white ones, on grey.

Scenes follow Markhorst 2024; a scene is random by its generator alone. Digits are those of MNIST, or drawn
as if handwritten: of strokes, bent by sine waves, turned, sheared and stretched. Works when copied alone.
"""

import functools

import numpy as np
from PIL import Image, ImageDraw

DIGIT = 28  # pixels, height and width of a digit of MNIST
SUPERSAMPLING = 4  # digits are drawn this many times larger, then averaged down
_BOWL_OF_3 = "curve .28 .46 .58 .54 .68 .74 .54 .94 .27 1 .02 .88"
STROKES = (  # of each digit: ways to write it, with / between them, each of strokes, with + between them
    "arc .35 .5 .33 .5 -100 260",
    "line .35 0 .35 1 / line .10 .27 .36 0 .36 1 / line .10 .25 .36 0 .36 1 + line .06 1 .66 1",
    "curve .04 .24 .13 .07 .35 0 .59 .09 .63 .30 .48 .56 .24 .80 .03 1 + line .03 1 .68 1 / curve .05 .20 "
    ".18 .04 .40 0 .60 .12 .60 .34 .42 .64 .20 .92 .06 .98 .04 .86 .16 .82 .36 .93 .54 1 .72 .92",
    f"curve .05 .14 .28 0 .56 .08 .60 .29 .28 .46 + {_BOWL_OF_3} / line .04 0 .62 0 .28 .46 + {_BOWL_OF_3}",
    "line .52 1 .52 0 .02 .68 .74 .68 / line .14 .02 .05 .58 .70 .58 + line .54 .06 .50 1",
    "line .64 0 .15 0 .10 .46 + curve .10 .46 .36 .36 .62 .48 .67 .71 .53 .93 .26 1 .02 .90",
    "curve .56 0 .28 .17 .08 .48 .05 .76 .17 .96 .38 1 .60 .88 .64 .67 .48 .51 .26 .53 .07 .72",
    "line .02 0 .66 0 .26 1 / line .02 0 .66 0 .26 1 + line .20 .52 .62 .52",
    "arc .35 .235 .26 .235 90 450 + arc .35 .735 .33 .265 -90 270 / curve .58 .12 .38 0 .14 .10 .14 .30 .36 "
    ".47 .60 .66 .60 .90 .34 1 .08 .88 .10 .66 .34 .48 .56 .30 .60 .12 .56 .06",
    "arc .33 .28 .29 .28 0 -360 + line .62 .22 .56 1 / arc .33 .28 .29 .28 0 -360 + curve .62 .24 .63 .60 "
    ".52 .90 .28 1 .06 .92")


@functools.cache
def _trace_stroke(stroke):
    """Points (n, 2) of a stroke, (x, y) with 0 <= y <= 1 downwards: line or curve (Catmull-Rom) of points, or
    arc of an ellipse: centre, radii, first and last angle in degrees, clockwise from the right."""
    kind, *numbers = stroke.split()
    p = np.array([float(number) for number in numbers]).reshape(-1, 2)
    if kind == "arc":
        centre, radii, (start, stop) = p
        angle = np.radians(np.linspace(start, stop, max(3, int(abs(stop - start) / 14))))
        return centre + radii * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    t = np.linspace(0, 1, 5 if kind == "line" else 6, endpoint=False)[:, None]
    if kind == "line":
        return np.concatenate([*(a + (b - a) * t for a, b in zip(p, p[1:])), p[-1:]])
    q = np.concatenate([p[:1], p, p[-1:]])[:, None]
    a, b, c, d = q[:-3], q[1:-2], q[2:-1], q[3:]  # (segments, 1, 2)
    parts = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([*parts, p[-1:]])


def _draw_digit(label, height, limit, rng):
    """A digit as if handwritten: coverage (h, w) uint8 with h = height, less where w would exceed `limit`."""
    ways = STROKES[label].split("/")
    strokes = [_trace_stroke(stroke) for stroke in ways[rng.integers(len(ways))].split("+")]
    points = np.concatenate(strokes)  # bent all together, so that they stay joined
    waves = rng.uniform(-1, 1, (2, 3)) * 1.2  # bent by three sine waves, each about one period per digit
    shift = np.sin(2 * np.pi * (points @ waves + rng.random(3)))  # (n, 3)
    points = points - (0.35, 0.5) + shift @ rng.normal(0, 0.025, (3, 2))
    angle, shear, stretch = rng.uniform((-15, -0.25, 0.85), (15, 0.25, 1.2))  # affine
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    points = points @ (np.array([[stretch, shear], [0, 1]]) @ np.array([[cos, -sin], [sin, cos]])).T
    pen = rng.uniform(0.08, 0.17) * height
    low, extent = points.min(0), np.ptp(points, 0)
    scale = min((height - pen) / extent[1], (limit - pen) / extent[0])
    points = ((points - low) * scale + pen / 2) * SUPERSAMPLING
    stroke_width = max(1, round(pen * SUPERSAMPLING))
    radius = (stroke_width - 1) / 2  # Pillow's ellipse covers both ends of its box
    mask = Image.new("L", tuple((np.ceil(extent * scale + pen).astype(int) * SUPERSAMPLING).tolist()))
    draw = ImageDraw.Draw(mask)
    for stroke in np.split(points, np.cumsum([len(s) for s in strokes])[:-1]):
        draw.line(stroke.ravel().tolist(), fill=255, width=stroke_width)
        for box in np.concatenate([stroke - radius, stroke + radius], axis=1).tolist():
            draw.ellipse(box, fill=255)  # round ends and joints
    return np.asarray(mask.reduce(SUPERSAMPLING))


def _fit_digit(digit, height, limit):
    """An MNIST digit (28, 28) uint8, cut to its ink and resized: (h, w) uint8, sizes as in _draw_digit."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    digit = digit[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    scale = min(height / digit.shape[0], limit / digit.shape[1])
    size = [max(1, round(side * scale)) for side in digit.shape[::-1]]
    return np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC))


def _paint(size, background, ink, masks, corners):
    """Digits of coverage (h, w), at corners (left, top), on a grey: uint8 (C, size, size); ink: (C,)."""
    scene = np.full((len(ink), size, size), round(255 * background), dtype=np.uint8)
    for mask, (left, top) in zip(masks, corners):
        paint = (background * 255 + 0.5) + mask * (ink - background)[:, None, None]  # + 0.5: rounded, not cut
        scene[:, top:top + mask.shape[0], left:left + mask.shape[1]] = paint
    return scene


def render_scene(index, rng, size, pool, digits, targets):
    """One digit, digits[index] or (None) a drawn one: scene (3, size, size) uint8, label."""
    box = max(6, round(rng.uniform(0.45, 0.85) * size)), round(0.85 * size)  # height, largest width
    background, brightness, saturation = rng.uniform((0.1, 0.7, 0), (0.3, 1.0, 0.9))
    tint = rng.random(3)
    ink = brightness * (1 - saturation * (1 - tint / tint.max()))  # (3,), its maximum is `brightness`
    corner, label = rng.random(2), int(targets[index % len(targets)])
    mask = _draw_digit(label, *box, rng) if digits is None else _fit_digit(digits[index], *box)
    corner = [int(share * (size - side + 1)) for share, side in zip(corner, mask.shape[::-1])]
    return _paint(size, background, ink, [mask], [corner]), label


def render_pair(index, rng, size, pool, digits, targets):
    """Two digits of `pool`, or drawn: scene (1, size, size), labels of Pairs; Markhorst 2024, section 3."""
    chosen = pool[rng.integers(0, len(pool), 2)]
    masks = digits[chosen] if digits is not None else [  # in the middle of (28, 28), as in MNIST
        np.pad(mask, [((DIGIT - side) // 2, (DIGIT - side + 1) // 2) for side in mask.shape])
        for mask in (_draw_digit(label, 20, 20, rng) for label in chosen)]
    background, corners = rng.uniform(0.1, 0.3), np.zeros((2, 2))  # (left, top) of each
    while np.abs(corners[0] - corners[1]).max() < DIGIT:
        corners = rng.integers(0, size - DIGIT + 1, (2, 2))
    labels = [[label, *corner, *(corner + DIGIT)] for label, corner in zip(targets[chosen], corners)]
    return _paint(size, background, np.ones(1), masks, corners), labels
