"""The report of a comparison as one picture for a README: a row per plan, a few frames each, and its figures."""

import json
import unicodedata

from dax.bench.compare_page import decibels
from dax.bench.compare_record import Comparison, Variant

FRAMES, ROOM, GAP, TITLE = 6, 210, 6, 46
CELL = 128  # pixels of a frame's height at least; smaller clips are enlarged by whole factors
ACCENT = "Mn"  # Unicode's category
INK, SOFT, GROUND = (22, 24, 29), (92, 99, 112), (255, 255, 255)


def sheet(comparison: Comparison, clips: dict[str, list], prompt: int):
    """A PIL image of one prompt: the reference, then every plan, as large as a README shows it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rows = [comparison.reference, *comparison.shown()[1:]]
    frames, height, width = clips[rows[0].name][prompt].shape[:3]
    factor = max(1, CELL // height) if height < CELL else min(1.0, 200 / width)
    size = (round(width * factor), round(height * factor))
    chosen = np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int)
    total = (ROOM + len(chosen) * (size[0] + GAP) + GAP, TITLE + len(rows) * (size[1] + GAP) + GAP)
    picture = Image.new("RGB", total, GROUND)
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    draw.text((GAP * 2, 12), fitted(title(comparison, prompt, large), large, total[0] - 4 * GAP), INK, large)
    for index, each in enumerate(rows):
        y = TITLE + index * (size[1] + GAP)
        draw.text((GAP * 2, y + 4), fitted(drawable(each.name, large), large, ROOM - 3 * GAP), INK, large)
        for line, words in enumerate(figures(each, comparison, prompt)):
            draw.text((GAP * 2, y + 30 + 18 * line), words, SOFT, small)
        for column, frame in enumerate(chosen):
            shown = Image.fromarray(np.asarray(clips[each.name][prompt][frame]))
            shown = shown.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX)
            picture.paste(shown, (ROOM + column * (size[0] + GAP), y))
    return picture


def figures(variant: Variant, comparison: Comparison, prompt: int) -> list[str]:
    """What stands beside a row, line by line; decibels are PSNR."""
    forwards = f"{sum(variant.computed.values()):.0f} forwards"
    if variant.role == "reference":
        return [forwards, "the reference"]
    return [
        f"{forwards}, {100 * variant.work:.0f} % of the work",
        f"this clip {decibels(variant.cells[prompt].psnr_db)}",
        f"all clips {decibels(variant.fidelity.psnr_db)}",
        f"noise floor {decibels(comparison.noise.fidelity.psnr_db)}",
    ]


def title(comparison: Comparison, prompt: int, font) -> str:
    """The prompt, after its number in the report where the font cannot write it as it is."""
    words = comparison.prompts[prompt]
    shown = drawable(words, font)
    return f"“{shown}”" if shown == words else f"{prompt + 1}. “{shown}”"


def drawable(words: str, font) -> str:
    """The words in letters that the font has: without accents it lacks, any other it lacks as JSON would escape it.

    Pillow's font, the only one that is surely here, has little beyond ASCII and draws a box for the rest.
    """
    box = glyph("\U0010ffff", font)  # never a character
    found = []
    for letter in unicodedata.normalize("NFC", " ".join(words.split())):
        if glyph(letter, font) != box:
            found.append(letter)
            continue
        parts = [part for part in unicodedata.normalize("NFKD", letter) if unicodedata.category(part) != ACCENT]
        known = parts and all(glyph(part, font) != box for part in parts)
        found += parts if known else [json.dumps(letter)[1:-1]]
    return "".join(found)


def glyph(letter: str, font) -> tuple:
    """What the font draws for it, to compare."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def fitted(words: str, font, room: int) -> str:
    """The words, cut with an ellipsis where they would not fit."""
    if font.getlength(words) <= room:
        return words
    while words and font.getlength(words + "…") > room:
        words = words[:-1]
    return words + "…"
