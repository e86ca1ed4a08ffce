"""What is read of pages: the text that is seen, and headings."""

from __future__ import annotations

import pytest
from bs4 import BeautifulSoup
from openbook_server.ingest.markup import first_heading, visible_text


def seen(page: str) -> str:
    return visible_text(BeautifulSoup(page, "html.parser"))


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "<p>The un<b>believ</b>able H<sub>2</sub>O of <a href=x>Ada</a> <em>Byron</em>, in <b>1843</b>.",
            "The unbelievable H2O of Ada Byron, in 1843.",
        ),
        ("su<wbr>per <ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby> a&nbsp;b", "super 漢(kan) a\xa0b"),
        ("<p>one\n <i> two </i>\tthree</p>four<br>five", "one two three\n\nfour\nfive"),
        (
            "<h1>Head</h1><p>One &amp; two<p>three<!-- no --><script>no</script><style>no</style><noscript>no</noscript>",
            "Head\n\nOne & two\n\nthree",
        ),
        ("<ul><li>a<li>b <b>c</b></ul>d<dl><dt>e<dd>f</dl>", "a\nb c\n\nd\n\ne\nf"),
        ("<table><caption>C</caption><tr><th>x</th><td>1</td></tr><tr><td>y<td>2</table>", "C\nx 1\ny 2"),
        ("<p>code:<pre>\ndef f(x):\n    return  x\n\n\nf(1)\n</pre>after", "code:\n\ndef f(x):\n    return  x\n\n\nf(1)\n\nafter"),
        ("<!doctype html><head><meta charset=utf-8><title>T</title><body><p>no head's end", "no head's end"),
        ("<body><p>x<head><title>later</title><p>in a late head", "x\n\nin a late head"),
        ("<p><![CDATA[data]]></p>", "data"),
        ("<div>" * 5_000 + "deep" + "</div>" * 5_000, "deep"),
        ("", ""),
    ],
)
def test_blocks_stand_apart_and_what_stands_in_a_line_does_not(page: str, text: str) -> None:
    assert seen(page) == text


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# Title", "Title"),
        ("text\n\n  ### Deep ###  \n# other", "Deep"),
        ("```sh\n#!/bin/bash\n# no\n~~~\n```\n# Real", "Real"),
        ("~~~\n# never closed", ""),
        ("---\ntitle: x\n# a yaml comment\n---\n\nUnderlined title\n===\n", "Underlined title"),
        ("---\n# no end of front matter", "no end of front matter"),
        ("#hashtag\n#\n#\t\n## Ok", "Ok"),
        ("one\n---\nx", "one"),
        ("- item\n---\n> quote\n===\nx | y\n\n--- | ---\n# T", "T"),
        ("text alone", ""),
        ("", ""),
    ],
)
def test_the_first_heading_of_a_markdown_text_is_one(text: str, title: str) -> None:
    assert first_heading(text) == title
