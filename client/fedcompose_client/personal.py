"""What in a text names or reaches a person, or opens a door: identifiers that the site knows, patterns, secrets.

The surest is the site's own dictionary: every value of its declared identifier columns, compared without case, accents,
spaces and punctuation. Patterns find the rest as far as they have a form; a name that no column lists is not found.
Two libraries look further where the extra `pii` is installed and site.toml asks for them. Nothing here uses a network.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from fedcompose.errors import MissingError
from fedcompose_client.overlap import SYLLABIC, words

MIN_IDENTIFIER_CHARS = 4  # letters and digits; what is shorter stands in any text
MIN_SYLLABIC_CHARS = 2  # of Chinese, Japanese and Korean, where names are that short
MIN_PART_CHARS = 4  # of a word of an identifier that is looked for by itself
MIN_PART_DIGITS = 5  # of a number in an identifier; shorter ones are ordinary numbers
MIN_SCORE = 0.4  # of presidio's; it is certain at 1, where a form has a check that holds
MAX_PERMUTED_WORDS = 3  # names are also looked for in another order of their words

# One pattern for each length, looked for at every place: what follows a number must not hide it.
_CARD = [
    re.compile(rf"(?<!\d)(?<!\d\.)(?=((?:2[2-7]|[3-6]\d)\d\d(?:[ -]?\d){{{length - 4}}})(?!\.?\d))")
    for length in range(13, 20)
]  # no card begins as the years from 2000 on do, which stand in rows
_IBAN = [re.compile(rf"\b(?=([A-Z]{{2}}\d{{2}}(?:[ -]?[A-Z0-9]){{{length - 4}}})\b)") for length in range(15, 35)]
_SYLLABIC = re.compile(f"[{SYLLABIC}]+")
_NUMBER = re.compile(r"\d+")
_PIECE = re.compile(r"\d+|\D+")  # of a word: an identifier may end where letters and digits meet
# How a keyboard without these letters writes them; `words` makes the bare letter of each.
_DIGRAPHS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"})
_PLAIN = {"Zs": " ", "Pd": "-", "Cf": ""}  # by Unicode's category
_BLOCKED = {
    "email": re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"),
    "ssn": re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    "secret": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{36}|\bglpat-[\w-]{20}|"
        r"\bxox[abprs]-[\w-]{10}|\bsk-[\w-]{20}|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^\s/:@]+:[^\s/@]+@"
    ),
}
_DOUBTFUL = {
    "phone": re.compile(
        r"(?<![\d)])(?<![\d)] )\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|(?<![\d-])\d{3}[.-]\d{3}[.-]\d{4}\b"
    ),
    "date": re.compile(r"\b(?:19|20)\d\d-\d\d?-\d\d?\b|\b\d\d?[./-]\d\d?[./-](?:19|20)\d\d\b"),
    "url": re.compile(r"\bhttps?://|\bwww\."),
    "address": re.compile(r"(?<!\d)(?<!\d\.)(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"),
}


class Identifiers:
    """The values of the identifier columns, to look for in texts."""

    def __init__(self, values: Iterable[str]) -> None:
        split = (words(each) for value in values for each in _umlauts(value))
        self.spelled = {spelling for each in split for spelling in _spellings(each)}
        self._lengths = sorted({len(spelling) for spelling in self.spelled})
        self.too_short = 0
        self.parts: set[str] = set()

    @classmethod
    def of(cls, values: Iterable[str], public: Collection[str]) -> Identifiers:
        """All values, and of those with several parts also each that is not in the `public` vocabulary."""
        distinct = set(values)
        made = cls(distinct)
        made.too_short = sum(_too_short(joined) for value in distinct if (joined := "".join(words(value))))
        split = [words(each) for value in distinct for each in _umlauts(value)]
        made.parts = {part for each in split for part in _parts(each) if part not in public}
        return made

    def names(self, text: str) -> bool:
        """Whether a whole identifier stands in the text, however it is spaced and punctuated."""
        found = [piece for word in words(text) for piece in _PIECE.findall(word)]
        ends = set(itertools.accumulate(map(len, found)))
        joined, start = "".join(found), 0
        for piece in found:
            for length in self._lengths:
                if start + length in ends and joined[start : start + length] in self.spelled:
                    return True
            start += len(piece)
        return False

    def mentions(self, text: str) -> bool:
        """Whether a word or a number of an identifier stands in the text."""
        found = words(text)
        return not self.parts.isdisjoint(found) or not self.parts.isdisjoint(_NUMBER.findall(" ".join(found)))


def blocked_patterns(text: str) -> Iterator[str]:
    """The names of the patterns in the text that nothing public has."""
    plain = _plain(text)
    yield from (name for name, pattern in _BLOCKED.items() if pattern.search(plain))
    if any(_passes_luhn(match[1]) for pattern in _CARD for match in pattern.finditer(plain)):
        yield "card"
    if any(_passes_mod_97(match[1]) for pattern in _IBAN for match in pattern.finditer(plain)):
        yield "iban"


def doubtful_patterns(text: str) -> Iterator[str]:
    """The names of the patterns in the text that a person should look at."""
    plain = _plain(text)
    yield from (name for name, pattern in _DOUBTFUL.items() if pattern.search(plain))


Scanner = Callable[[str], Mapping[str, bool]]  # what was found, and whether it is certain


def presidio() -> Scanner:
    """Presidio's recognizers without a language model: forms and checksums, no names.

    Raises: MissingError: `PACKAGE_MISSING`.
    """
    try:
        import tldextract.tldextract
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NoOpNlpEngine
    except ImportError as error:
        raise _missing("presidio") from error
    # Its check of mail addresses would fetch the list of public suffixes; the one in the package will do.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    engine = NoOpNlpEngine(models=[{"lang_code": "en", "model_name": "none"}])
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
    entities = [each for each in analyzer.get_supported_entities("en") if each not in _GUESSES]

    def scan(text: str) -> dict[str, bool]:
        found = sorted((each.entity_type.lower(), each.score) for each in analyzer.analyze(text, "en", entities))
        return {name: score == 1 for name, score in found if score >= MIN_SCORE}

    return scan


def detect_secrets() -> Scanner:
    """detect-secrets' plugins that know a secret by its form, without those that guess by entropy.

    Raises: MissingError: `PACKAGE_MISSING`.
    """
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError as error:
        raise _missing("detect-secrets") from error
    classes: Iterable[Any] = get_mapping_from_secret_type_to_class().values()
    plugins = [each() for each in classes if not any(guess in each.__name__ for guess in _GUESSING_PLUGINS)]

    def scan(text: str) -> dict[str, bool]:
        return {each.secret_type: True for each in plugins for line in text.splitlines() if _finds(each, line)}

    return scan


SCANNERS: dict[str, Callable[[], Scanner]] = {"presidio": presidio, "detect-secrets": detect_secrets}
# Entities that plain numbers of a calculation are taken for.
_GUESSING_PLUGINS = ("Entropy", "Keyword", "IPPublic")
_GUESSES = frozenset({"DATE_TIME", "US_BANK_NUMBER", "US_DRIVER_LICENSE", "PHONE_NUMBER", "US_PASSPORT", "US_ITIN"})


def _finds(plugin: Any, line: str) -> bool:
    return any(True for _ in plugin.analyze_string(line))


def _missing(name: str) -> MissingError:
    return MissingError(
        "PACKAGE_MISSING", f"site.toml wants traces looked at by {name}, which is not installed",
        fix="pip install 'fedcompose-client[pii]', or drop it from the domain's scanners",
    )  # fmt: skip


def _umlauts(value: str) -> set[str]:
    """The value with its umlauts as they are, and in both forms in which a keyboard without them writes them."""
    composed = unicodedata.normalize("NFC", value).casefold()
    return {composed, composed.translate(_DIGRAPHS), re.sub("([aou])e", r"\1", composed)}


def _spellings(value: list[str]) -> Iterator[str]:
    """The value without spaces, in every order of its words if they are few."""
    joined = "".join(value)
    if not _too_short(joined):
        permuted = len(value) <= MAX_PERMUTED_WORDS and not _SYLLABIC.fullmatch(joined)
        yield from map("".join, itertools.permutations(value)) if permuted else [joined]


def _too_short(joined: str) -> bool:
    return len(joined) < (MIN_SYLLABIC_CHARS if _SYLLABIC.fullmatch(joined) else MIN_IDENTIFIER_CHARS)


def _parts(value: list[str]) -> Iterator[str]:
    """The words of a value of several words, and the numbers of one that is not all digits."""
    joined = "".join(value)
    if len(value) > 1:
        yield from (word for word in value if len(word) >= MIN_PART_CHARS and not word.isdigit())
    if not joined.isdigit():
        numbers = _NUMBER.findall(" ".join([*value, joined]))
        yield from (number for number in numbers if len(number) >= MIN_PART_DIGITS)


def _plain(text: str) -> str:
    """The text with one form of every character, one kind of space and of dash, and none that are not seen."""
    composed = unicodedata.normalize("NFKC", text)
    return "".join(_PLAIN.get(unicodedata.category(each), each) for each in composed)


def _passes_luhn(text: str) -> bool:
    digits = [int(each) for each in text if each.isdigit()][::-1]
    return (sum(digits[::2]) + sum(sum(divmod(2 * each, 10)) for each in digits[1::2])) % 10 == 0


def _passes_mod_97(text: str) -> bool:
    plain = text.replace(" ", "").replace("-", "")
    return int("".join(str(int(each, 36)) for each in plain[4:] + plain[:4])) % 97 == 1
