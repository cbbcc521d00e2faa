"""Writes clips of the drawn world: python plain/clips.py FOLDER COUNT [HEIGHT WIDTH]; in several sizes without one."""

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
    sizes = (tuple(map(int, sys.argv[3:5])),) if len(sys.argv) > 3 else SIZES
    folder.mkdir()
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        write(folder / f"{i:03d}.mp4", to_frames(world.clip(7, i, FRAMES, height, width)[0]), Fraction(8))


if __name__ == "__main__":
    main()
