"""Small files of many formats, and damage done to them at random."""

import io
import random

import numpy as np
from PIL import Image

GREY = (np.arange(768, dtype=np.uint16) * 85).reshape(24, 32)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (32, 24)) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def seeds() -> dict[str, bytes]:
    """One file of each coding; the formats behind PGM are not read, and must be said so."""
    small = picture()
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [picture(1)]}
    return {
        "JPEG": encoded(small),
        "JPEG progressive": encoded(small, exif=turned, progressive=True),
        "JPEG CMYK": encoded(small.convert("CMYK")),
        "PNG": encoded(small, "PNG", exif=turned),
        "PNG palette": encoded(small.convert("P"), "PNG", transparency=3),
        "PNG 16 bit": encoded(Image.fromarray(GREY), "PNG"),
        "APNG": encoded(small, "PNG", **frames),
        "GIF": encoded(small, "GIF", **frames),
        "WebP": encoded(small, "WEBP"),
        "WebP lossless": encoded(small.convert("RGBA"), "WEBP", lossless=True),
        "WebP animated": encoded(small, "WEBP", **frames),
        "BMP": encoded(small, "BMP"),
        "TIFF LZW": encoded(small, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(small, "TIFF", compression="jpeg"),
        "TIFF float": encoded(small.convert("L").convert("F"), "TIFF"),
        "PPM": encoded(small, "PPM"),
        "PGM": encoded(small.convert("L"), "PPM"),
        "ICO": encoded(small, "ICO"),
        "TGA": encoded(small, "TGA", compression="tga_rle"),
        "PCX": encoded(small, "PCX"),
        "JPEG 2000": encoded(small, "JPEG2000"),
        "AVIF": encoded(small, "AVIF"),
    }


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The file with bits turned, bytes overwritten, taken out or doubled."""
    body = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 40))):
        at = draw.randrange(len(body))
        edit = draw.randrange(4)
        if edit == 0:
            body[at] ^= 1 << draw.randrange(8)
        elif edit == 1:
            body[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif edit == 2:
            del body[at : at + draw.randrange(1, 20)]
        else:
            body[at:at] = body[draw.randrange(len(body)) :][: draw.randrange(1, 30)]
        if len(body) < 2:
            break
    return bytes(body)
