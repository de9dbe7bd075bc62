"""Cleaning of captions: exactly what diffusers does, within bounded time, and nothing left where nothing is."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from md_assets.storage.caption_cleaning import CLEANED_CHARACTERS, cleaned_caption

CAPTIONS = {
    "case": "A Photo of <PERSON> in FRONT of the house",
    "html": '<p class="x">Hello <b>World</b> &amp; &quot;more&quot; &lt;b&gt;</p><!-- no --><script>f()</script>',
    "urls": "see https://example.com/a?b=1 or www.example.org/x and example.co today http:/x",
    "user": "by @some_user and a@b.c",
    "files": "holiday-photo-2015.jpg IMG_1234.JPEG and jc6640 jc6640vc 6640vc231",
    "emoji": "Two 🙂👩‍🚀 friends ☃",
    "chinese": "红色 a 图片 of 東京 カタカナ ㈱",
    "dashes": "this-is-my-cute-cat — it_is_so_cute – yes",
    "quotes": "«quoted» “text” `x` ´y´ '''z'''",
    "numbers": "#123 #12345 1234567 12:34 192.168.0.1 100x200 page 12",
    "shop": "Free Shipping worldwide free shipping, free download, click for details 3x4 png image of a vase",
    "mojibake": "cafÃ© â€™s",
    "escapes": "100%25 caf%C3%A9+au+lait \\n new",
    "lines": "two\nlines\r\n\tand tabs  ",
    "markup": "a < b > <i>c</i> <unclosed",
    "long": "lorem ipsum dolor " * 200,
    "plain": "a red car at sunset",
}


@pytest.fixture(scope="module")
def reference() -> Callable[[str], str]:
    """diffusers' own method, on a pipeline that was not given anything."""
    from diffusers import IFPipeline

    pipeline = object.__new__(IFPipeline)
    return lambda text: pipeline._text_preprocessing(text, clean_caption=True)[0]


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_cleaned_as_diffusers_does_it(reference: Callable[[str], str], name: str) -> None:
    cleaned = cleaned_caption(CAPTIONS[name])
    assert cleaned == reference(CAPTIONS[name]) and cleaned
    assert (cleaned == CAPTIONS[name]) == (name == "plain")


def test_it_is_cleaned_twice() -> None:
    """Once leaves what the cleaner itself uncovers."""
    from diffusers import IFPipeline

    text = "%253Cb%253Ebold"
    once = IFPipeline._clean_caption(object.__new__(IFPipeline), text)
    assert cleaned_caption(text) == IFPipeline._clean_caption(object.__new__(IFPipeline), once) != once


@pytest.mark.parametrize(
    "text", ["", " \n", "...", "图片", "图片.", "<b></b>", "https://example.com/x", "@user", " . . "]
)
def test_nothing_is_left_of_what_has_no_words(text: str) -> None:
    assert cleaned_caption(text) == ""


@pytest.mark.parametrize(
    ("text", "cleaned"), [("a%00b", "ab"), ("a&#0;b", "a\ufffdb"), ("a%2500b", "ab"), ("a &#xd83d; b", "a \ufffd b")]
)
def test_markup_cannot_spell_what_no_shard_may_hold(text: str, cleaned: str) -> None:
    assert cleaned_caption(text) == cleaned


def test_a_lone_full_stop_is_what_the_cleaner_would_leave(reference: Callable[[str], str]) -> None:
    assert reference("图片.") == "."


@pytest.mark.parametrize("text", ["<![ x>", "&#" + "9" * 4500 + ";"], ids=["markup", "reference"])
def test_what_the_cleaner_refuses_has_no_caption(reference: Callable[[str], str], text: str) -> None:
    with pytest.raises(Exception, match=r"rejected by the parser|Exceeds the limit"):
        reference(text)
    assert cleaned_caption(text) == ""


@pytest.mark.parametrize("pattern", ["1", "x" * 99 + " ", "🙂", "<b>"])
def test_a_caption_of_100_000_characters_is_cleaned_as_far_as_anybody_reads(
    reference: Callable[[str], str], pattern: str
) -> None:
    text = (pattern * 100_000)[:99_999] + "z"
    started_s = time.monotonic()
    cleaned = cleaned_caption(text)
    assert time.monotonic() - started_s < 20  # whole, some of these take minutes
    left = reference(text[:CLEANED_CHARACTERS])
    assert cleaned == ("" if not left.strip(". ") else left)


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, md_assets.storage.caption_cleaning, md_assets.stages.mds;"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'bs4', 'ftfy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
