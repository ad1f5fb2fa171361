"""Picture files as 8-bit arrays, read with Pillow.

Rules, so that a set is the same wherever it is read:

- 16 bits a pixel become 8 by leaving out the low byte (v >> 8). Pictures of 32 bits a pixel (Pillow's modes
  `I` and `F`) are refused, as nothing in them says which value is white.
- Transparent pictures (an alpha channel, or a transparent colour) are laid on white.
- Palettes, CMYK, YCbCr, LAB and HSV become RGB. Of several frames or pages the first is taken.
- A picture is turned as its EXIF orientation says, so that it stands as viewers show it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.images import on_white

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def decode(files: Sequence[Path], size: tuple[int, int] | None, root: Path) -> np.ndarray:
    """u8[n, H, W, 1 or 3]: grey if every file is grey.

    Args:
      files: the pictures, below `root`.
      size: (H, W) to resize to; None where all have one size already.
      root: for messages.

    Raises:
      UserError: naming `data.source` and the file at fault.
    """
    source = f"folder:{root}"
    try:
        from PIL import Image
    except ImportError as e:
        raise UserError("data.source", source, "reading images needs Pillow", "pip install pillow") from e
    arrays, shape = [], None
    with warnings.catch_warnings():
        # The user's own files: Pillow's warning of large pictures is meant for those of strangers.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for file in files:
            name = file.relative_to(root)
            try:
                with Image.open(file) as image:
                    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                        why = f"{name} has 32 bits a pixel (mode {image.mode!r}), and no scale of them"
                        raise UserError("data.source", source, why, "Save it with 8 or 16 bits a pixel.")
                    pixels = _eight_bits(image, size)
            except UserError:
                raise
            except Image.DecompressionBombError as e:
                why = f"{name} is too large for Pillow ({e})"
                raise UserError("data.source", source, why, "Shrink that picture, or cut it up.") from e
            except Exception as e:  # a damaged file raises whatever its reader happens to meet
                why = f"{name} cannot be read as an image ({str(e) or type(e).__name__})"
                raise UserError("data.source", source, why, "Replace or remove that file.") from e
            if shape is not None and pixels.shape[:2] != shape:
                why = f"{name} has the size {pixels.shape[:2]}, those before it {shape}"
                raise UserError("data.source", source, why, f"Say a size: {source}#size=64")
            shape = pixels.shape[:2]
            arrays.append(pixels)
    if any(a.ndim == 3 for a in arrays):
        return np.stack([a if a.ndim == 3 else np.repeat(a[..., None], 3, -1) for a in arrays])
    return np.stack(arrays)[..., None]


def _eight_bits(image: Any, size: tuple[int, int] | None) -> np.ndarray:
    """u8[H, W] of a grey picture, u8[H, W, 3] of any other; `image` is Pillow's."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # of "I" only PPM comes here, in 0..65535
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        straight = image.convert("LA") if image.mode == "La" else image  # "La" is multiplied by its alpha
        pixels = on_white(np.asarray(straight.convert("RGBA")))
        image = Image.fromarray(pixels[..., 0] if is_grey else pixels)
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8)
