"""Scorers that were learned: CLIP, its aesthetic head, BLIP and GIT captions, text detection; through transformers.

A reference is a folder or "owner/repo[@revision]" of the Hub, in the layout of transformers. Weights are loaded when a
scorer is, never on import, and only from safetensors. Pictures are prepared here, with the figures of the folder's
preprocessor_config.json, so that torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from vgen import hub
from vgen.cache import read_json
from vgen.errors import VgenError
from vgen.scorers import Card, View
from vgen.standins import Box, union_area

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT_MEAN, TEXT_STD = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)  # of red, green and blue, as PaddleOCR has them
TEXT_SIDE, TEXT_STEP = 960, 32  # the longer side in which text is looked for, and what sides are multiples of
TEXT_PIXEL, TEXT_BOX, TEXT_GROW = 0.3, 0.6, 1.5  # least probability of a pixel and of a box, and growth of boxes
WORDS = 40  # tokens of a caption at most
GIT_FRAMES = 6  # that a model sees which does not say how many


def folder_of(reference: str) -> Path:
    """The folder of a reference, downloaded where it is not one. Raises VgenError."""
    if Path(reference).is_dir():
        return Path(reference)
    repo, _, revision = reference.partition("@")
    if repo.count("/") != 1:
        raise VgenError(f"There is no folder '{reference}'.", "Name a folder, or owner/repo of the Hub.")
    return hub.fetch(repo, revision or "main")


def _model(kind: str, reference: str, device: str) -> tuple[Path, Any]:
    """A model of transformers, ready, and its folder. Raises VgenError where weights are missing."""
    import transformers

    folder = folder_of(reference)
    model, told = getattr(transformers, kind).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if lacks := sorted(told["missing_keys"]):  # transformers would fill them with random numbers
        raise VgenError(f"{folder} lacks {len(lacks)} weights of {kind}: {', '.join(lacks[:3])}.", "Name another one.")
    return folder, model.to(device).eval()


class _Pictures:
    """Pictures (H, W, 3) uint8 to (N, 3, S, S): resized to the shorter side, cut at the centre, normalised."""

    def __init__(self, folder: Path, size: int, *, square: bool = False) -> None:
        path = folder / "preprocessor_config.json"
        told = read_json(path) if path.exists() else {}
        self.mean, self.std = told.get("image_mean", CLIP_MEAN), told.get("image_std", CLIP_STD)
        self.size, self.square = size, square

    def __call__(self, images: Sequence[Any]) -> Tensor:
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        height, width = pixels.shape[2:]
        scale = self.size / min(height, width)
        whole = (self.size, self.size) if self.square else (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, whole, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255) / 255
        top, left = (whole[0] - self.size) // 2, (whole[1] - self.size) // 2
        pixels = pixels[0, :, top : top + self.size, left : left + self.size]
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class Aesthetic:
    """The LAION aesthetic score: a head on the normalised image embedding of CLIP, about 1 to 10, mean of the stills.

    The head lies in the weights of the folder as `predictor.*` (linear) or `layers.N.*` (linear layers in a row).
    """

    def __init__(self, reference: str, device: str) -> None:
        self.device = device
        self.head = _head(folder_of(reference)).to(device)
        folder, self.clip = _model("CLIPVisionModelWithProjection", reference, device)
        self.pictures = _Pictures(folder, self.clip.config.image_size)

    @torch.inference_mode()
    def __call__(self, view: View, /) -> Mapping[str, Any]:
        found = self.clip(pixel_values=self.pictures(view.stills).to(self.device)).image_embeds
        return {"aesthetic": round(self.head(F.normalize(found.float(), dim=-1)).mean().item(), 4)}


def _head(folder: Path) -> nn.Module:
    """The head in the weights of a folder. Raises VgenError where there is none."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {k: file.get_tensor(k) for k in file.keys() if k.startswith(("predictor.", "layers."))}  # noqa: SIM118, no dict
    names = sorted((k.removesuffix(".weight") for k in weights if k.endswith(".weight")), key=_place)
    if not names:
        raise VgenError(
            f"{folder} has no aesthetic head: no weights 'predictor.*' or 'layers.N.*'.",
            "Take a repository that has CLIP and the head, such as shunk031/aesthetics-predictor-v1-vit-large-patch14.",
        )
    layers = []
    for name in names:
        weight = weights[f"{name}.weight"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"].float()})
        layers.append(layer)
    return nn.Sequential(*layers).eval()


def _place(name: str) -> int:
    """The number of a layer."""
    return int(name.rpartition(".")[2]) if name.startswith("layers.") else 0


class Similarity:
    """The cosine of CLIP's embeddings of the stills with those of the captions, mean over both."""

    def __init__(self, reference: str, device: str) -> None:
        from transformers import AutoTokenizer

        self.device = device
        folder, self.clip = _model("CLIPModel", reference, device)
        self.pictures = _Pictures(folder, self.clip.config.vision_config.image_size)
        self.words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.most = self.clip.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, view: View, /) -> Mapping[str, Any]:
        if not view.captions:
            return {"clip_sim": None}
        words = self.words(
            list(view.captions.values()), padding=True, truncation=True, max_length=self.most, return_tensors="pt"
        )
        told = {name: words[name].to(self.device) for name in ("input_ids", "attention_mask")}
        found = self.clip(pixel_values=self.pictures(view.stills).to(self.device), **told)
        pictures, texts = F.normalize(found.image_embeds, dim=-1), F.normalize(found.text_embeds, dim=-1)
        return {"clip_sim": round((pictures @ texts.T).mean().item(), 5)}


class Blip:
    """A caption of the middle frame by BLIP, the likeliest words first."""

    def __init__(self, reference: str, device: str) -> None:
        from transformers import AutoTokenizer

        self.device = device
        folder, self.model = _model("BlipForConditionalGeneration", reference, device)
        self.pictures = _Pictures(folder, self.model.config.vision_config.image_size, square=True)
        self.words = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def __call__(self, view: View, /) -> Mapping[str, Any]:
        pixels = self.pictures([view.stills[len(view.stills) // 2]]).to(self.device)
        made = self.model.generate(pixel_values=pixels, max_new_tokens=WORDS, do_sample=False)
        return {"captions.image": str(self.words.decode(made[0], skip_special_tokens=True)).strip() or None}


class Git:
    """A caption of the clip by GIT trained on video, from frames spread over it."""

    def __init__(self, reference: str, device: str) -> None:
        from transformers import AutoTokenizer

        self.device = device
        folder, self.model = _model("GitForCausalLM", reference, device)
        self.pictures = _Pictures(folder, self.model.config.vision_config.image_size)
        self.words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.count = self.model.config.num_image_with_embedding or GIT_FRAMES

    @torch.inference_mode()
    def __call__(self, view: View, /) -> Mapping[str, Any]:
        places = np.linspace(0, len(view.frames) - 1, self.count).round().astype(int)
        pixels = self.pictures([view.frames[i] for i in places])[None].to(self.device)
        made = self.model.generate(pixel_values=pixels, max_new_tokens=WORDS, do_sample=False)
        return {"captions.video": str(self.words.decode(made[0], skip_special_tokens=True)).strip() or None}


class TextDetector:
    """The share of the frame in boxes of text, the largest of the stills, by a detector of PaddleOCR (PP-OCRv5)."""

    def __init__(self, reference: str, device: str) -> None:
        self.device = device
        _, self.model = _model("AutoModelForObjectDetection", reference, device)

    @torch.inference_mode()
    def __call__(self, view: View, /) -> Mapping[str, Any]:
        return {"text_area": round(max(self._area(still) for still in view.stills), 5)}

    def _area(self, image: Any) -> float:
        """The share of a picture (H, W, 3) uint8."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        scale = min(1, TEXT_SIDE / max(pixels.shape[2:]))
        sides = [max(TEXT_STEP, round(side * scale / TEXT_STEP) * TEXT_STEP) for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels, sides, mode="bilinear", align_corners=False) / 255
        pixels = (pixels - torch.tensor(TEXT_MEAN)[:, None, None]) / torch.tensor(TEXT_STD)[:, None, None]
        found = self.model(pixel_values=pixels.flip(1).to(self.device)).last_hidden_state
        likely = found[0, 0].float().cpu().numpy()
        return union_area(boxes(likely), *likely.shape)


def boxes(likely: Any) -> list[Box]:
    """Upright boxes around what is text in a map (h, w) of probabilities, grown back to the size of the letters."""
    import cv2

    outlines, _ = cv2.findContours((likely > TEXT_PIXEL).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for outline in outlines:
        left, top, width, height = cv2.boundingRect(outline)
        if min(width, height) < 3 or likely[top : top + height, left : left + width].mean() < TEXT_BOX:
            continue
        grow = round(TEXT_GROW * width * height / (2 * (width + height)))
        found.append(Box(left - grow, top - grow, left + width + grow, top + height + grow))
    return found


aesthetic = Card(("aesthetic",), "LAION's aesthetic score on CLIP", Aesthetic, reference="FOLDER|OWNER/REPO")
similarity = Card(
    ("clip_sim",),
    "CLIP similarity of frames and captions",
    Similarity,
    reference="FOLDER|OWNER/REPO",
    needs_captions=True,
)
blip = Card(("captions.image",), "BLIP's caption of the middle frame", Blip, reference="FOLDER|OWNER/REPO")
git = Card(("captions.video",), "GIT's caption of the clip", Git, reference="FOLDER|OWNER/REPO")
text = Card(("text_area",), "text found by PP-OCRv5", TextDetector, reference="FOLDER|OWNER/REPO")
