"""Writes clips of the drawn world in several sizes: python plain/clips.py FOLDER COUNT."""

import sys
from fractions import Fraction
from pathlib import Path

from vgen import world
from vgen.generate import to_frames
from vgen.video_write import write

SIZES = ((64, 64), (96, 128), (144, 256), (240, 320))  # height, width
FRAMES = 24


def main() -> None:
    """Write them at 8 frames a second."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir()
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        write(folder / f"{i:03d}.mp4", to_frames(world.clip(7, i, FRAMES, height, width)[0]), Fraction(8))


if __name__ == "__main__":
    main()
