"""Frames of a pipeline to a file, as its users write them: PyAV makes an mp4; no extension, a folder of PNGs."""

from fractions import Fraction
from pathlib import Path

import av


def save(path: Path, frames: list, fps: Fraction) -> None:
    """PIL images to H.264, or to PNGs."""
    if path.suffix != ".mp4":
        path.mkdir()
        for i, frame in enumerate(frames):
            frame.save(path / f"frame_{i:05d}.png")
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
