"""WikiText as lm-eval's wikitext task reads it: in pages, without the spaces that its tokenization put in."""

import re

TITLE = re.compile(r"^ = [^=].* = ?$", re.MULTILINE)  # a page's; those of sections have more of them
SPACED = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
MARKS = [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
ENCLOSED = [
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
]
OTHERS = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def pages(text: str) -> list[str]:
    """The pages of WikiText, each from its title to the last line before the next; another text is one page."""
    if not is_wikitext(text):
        return [text]
    starts = [found.start() for found in TITLE.finditer(text)]
    *most, last = (text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return [*(page.removesuffix("\n") for page in most), last]


def is_wikitext(text: str) -> bool:
    """Whether a text begins with a page's title, ` = Title = `."""
    return TITLE.match(f" {text.lstrip()}") is not None


def detokenized(page: str) -> str:
    """A page of WikiText as running text, by the same replacements in the same order; any other text as it is."""
    if not is_wikitext(page):
        return page
    for old, new in [*SPACED, *MARKS]:
        page = page.replace(old, new)
    for pattern, new in ENCLOSED:
        page = re.sub(pattern, new, page)
    for old, new in OTHERS:
        page = page.replace(old, new)
    return page
