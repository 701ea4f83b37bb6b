"""Varied strings for the tokenization test: the same seed, the same strings.

Written for this test, or put together from Unicode ranges by a seeded generator.
"""

import random
from collections.abc import Callable, Iterator

SENTENCES = (
    "The quick brown fox can't jump over what it's never seen, she'd say; they've tried and we'll see.",
    "I'M SURE YOU'RE RIGHT, HE'S LATE AND THEY'LL WAIT. O'Neill's dog isn't 'quoted' or ''doubly'' so.",
    "Les élèves étaient déjà là où l'été s'achève, près du cœur de la forêt: ça va, n'est-ce pas ?",
    "Über den Wäldern hängt schwerer Nebel; die Straße führt bis zum Fluß, größer als man's glaubt.",
    "El niño pidió una caña pequeña; ¿cuándo llegará mañana el pingüino? ¡Qué vergüenza!",
    "Ночью на площади шёл снег, и часы пробили двенадцать; он сказал: «Пойдём скорее домой».",
    "Η θάλασσα ήταν ήσυχη το πρωί, κι ο ψαράς έριξε τα δίχτυα του δίπλα στο νησί.",
    "今天早上的市场很热闹,老板说苹果三块五一斤。我们买了两斤,然后坐地铁回家。",
    "昨日の夜、駅前のカフェでコーヒーを飲みながらゆっくりと本を読みました。楽しかった!",
    "오늘 아침에는 비가 와서 우산을 들고 학교에 갔습니다. 점심은 김밥을 먹었어요.",
    "السوق مزدحم في الصباح، والبائع يقول إن التفاح رخيص اليوم؛ هل نشتري كيلوين؟",
    "השמש עלתה מעל ההרים והציפורים התחילו לשיר; מישהו פתח את החלון.",
    "आज सुबह बाज़ार में बहुत भीड़ थी, और हमने दो किलो आम ख़रीदे।",
    "เช้านี้ตลาดคนเยอะมาก แม่ค้าบอกว่ามะม่วงลดราคาครึ่งหนึ่ง",
    "আজ সকালে নদীর ধারে অনেক মানুষ হাঁটছিল, আকাশ ছিল নীল।",
    "இன்று காலை சந்தையில் கூட்டம் அதிகம்; நாங்கள் மாம்பழம் வாங்கினோம்.",
    "Sáng nay chợ rất đông, người bán nói xoài đang giảm giá một nửa.",
    "Wczoraj wieczorem żółw zjadł świeżą gęś, a łoś patrzył na źdźbło trawy.",
    "Bu sabah İstanbul'da ılık bir rüzgâr esiyordu; çocuklar ağaçların altında oynuyordu.",
    "დღეს დილით ბაზარში ბევრი ხალხი იყო და ჩვენ ვიყიდეთ ყურძენი.",
    "Այսօր առավոտյան շուկայում շատ մարդ կար, և մենք խնձոր գնեցինք։",
    "ዛሬ ጠዋት በገበያው ብዙ ሰው ነበር፤ እኛም ቡና ገዛን።",
    "Hôm qua tôi đọc sách; ngày mai sẽ viết thư cho bạn bè ở xa.",
    "ខ្ញុំបានទិញផ្លែឈើនៅផ្សារព្រឹកនេះ។",
)

CODE = (
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # in m²\n\nprint(f\"{area(2):.3f}\")\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n\tif (sum >= 0x7FFF'FFFF) break; // clip\n}\n",
    "SELECT id, COUNT(*) AS n\nFROM   orders o\nWHERE  o.total >= 99.90 AND o.note <> 'it''s'\nGROUP BY 1;\n",
    "fn main() {\r\n    let xs: Vec<u32> = (0..10).map(|x| x * x).collect();\r\n"
    "    println!(\"{:?}\", xs);\r\n}\r\n",
    "const f = async (url) => { const r = await fetch(`${url}?q=${q}`); return r?.ok ? r.json() : null; };",
    "<div class=\"card\" data-id='42'>\n  <p>5 &lt; 6 &amp;&amp; 7&nbsp;&gt; 3</p>\n</div>\n",
    "#!/usr/bin/env bash\nset -euo pipefail\nfor f in *.txt; do wc -l \"$f\" | awk '{print $1}'; done\n",
    "{\"a\": [1, 2.5e-3, -0.0, null, true], \"b\": {\"c\\u00e9\": \"\\n\\t\\\"\"}}",
    "class Tree<T extends Comparable<T>> {\n    private Node<T> root;\n"
    "    @Override public String toString() { return \"\"; }\n}",
    "package main\n\nimport \"fmt\"\n\n"
    "func main() {\n\tdefer func() { recover() }()\n\tfmt.Printf(\"%08b\\n\", 37)\n}\n",
    "\\begin{align}\n  \\int_0^\\infty e^{-x^2}\\,dx &= \\frac{\\sqrt{\\pi}}{2} \\\\\n\\end{align}",
    "key:\n  - item: &anchor \"v\"\n    <<: *anchor\n  - |\n    literal   text\n",
)  # fmt: skip

WEB = (
    "https://example.com/a/b-c_d.html?x=1&y=%20z#frag-2",
    "http://[2001:db8::1]:8080/path;v=1",
    "user.name+tag@mail.example.co.uk",
    "ftp://files.example.org/pub/v1.2.3/readme.txt",
    "@someone #hashtag #日本 $TICKER 50%off",
    "C:\\Users\\Me\\file.txt",
    "../../etc/passwd",
    "192.168.0.255/24",
    "+49 (0)30 1234-5678",
)

WHITESPACE = (
    " ",
    "  ",
    "   ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\u00a0",
    "\u200b",
    "\u2003",
    "\u3000",
)
ODD_SPACES = (
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\u1680",
    "\u2028",
    "\u2029",
    "\u202f",
    "\u205f",
    "\ufeff",
    "\u180e",
)
EMOJI = (
    "😀", "🚀✨", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇯🇵", "❤️", "☎", "🧑🏿‍💻", "1️⃣", "🫠", "⌚️⏰",
)  # fmt: skip
COMBINING = (
    "e\u0301",
    "n\u0303",
    "a\u0308\u0304",
    "Z\u0351\u036b\u0343",
    "\u0301",
    "ก็",
    "क्ष",
    "각",
    "\u1112\u1161\u11ab",
)
NUMBERS = (
    "0", "7", "42", "123", "1234", "12345", "1234567890", "3.14159", "1,234,567.89", "-273.15",
    "6.02e23", "0xDEADBEEF",
    "1/2", "½", "²³", "Ⅷ", "٣٤٥", "१२३", "四百二十", "①②③", "𝟘𝟙𝟚", "1st", "2nd", "20th", "v2.0.1",
    "2024-02-29T23:59:60Z",
)  # fmt: skip
PUNCTUATION = (
    "...", "…", "!!!", "?!", "---", "—", "–", "«»", "“”", "‘’", "''", "\"\"", "()[]{}", "<|", "|>",
    "<>", "&&", "||", "::",
    "->", "=>", "!=", "$$", "€£¥", "©®™", "§¶", "`code`", "**bold**", "~~", "^_^", "\\n", "%s", "'s",
    "'S", "'ll", "'LL",
    "’s", "'t", "n't", "'x", "、。", "،؛؟", "।", "·", "•", "¿¡", "+-*/=", "@#", "_", "__init__",
)  # fmt: skip
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<file_sep>",
    "<jupyter_start>",
    "<empty_output>",
)
NEAR_SPECIALS = (
    "<|im_start",
    "im_end|>",
    "<|im_ end|>",
    "<|IM_END|>",
    "<| endoftext |>",
    "<|",
    "|>",
    "<<|im_end|>>",
)
UNICODE_RANGES = (
    (0x20, 0x7F), (0xA0, 0x100), (0x100, 0x250), (0x250, 0x300), (0x300, 0x370), (0x370, 0x400),
    (0x400, 0x530),
    (0x590, 0x600), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x10A0, 0x1100), (0x1100, 0x1200),
    (0x1E00, 0x1F00),
    (0x2000, 0x2070), (0x2070, 0x20A0), (0x20A0, 0x20C0), (0x2100, 0x2190), (0x2190, 0x2400),
    (0x2500, 0x2600),
    (0x2600, 0x27C0), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xA960, 0xA980), (0xAC00, 0xD7A0),
    (0xF900, 0xFB00),
    (0xFB00, 0xFE00), (0xFE00, 0xFF00), (0xFF00, 0xFFF0), (0x10000, 0x10100), (0x10330, 0x10350),
    (0x1D400, 0x1D800),
    (0x1F300, 0x1F650), (0x1F900, 0x1FA00), (0x20000, 0x20100), (0xE000, 0xE010), (0xE0000, 0xE0080),
)  # fmt: skip
ROLES = ("system", "user", "assistant")


def _words(rng: random.Random) -> str:
    words = rng.choice(SENTENCES).split(" ")
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, 8)])


def _code(rng: random.Random) -> str:
    code = rng.choice(CODE)
    start = rng.randrange(len(code) // 2)
    return code[start : start + rng.randint(5, 80)]


def _range(rng: random.Random) -> str:
    low, high = rng.choice(UNICODE_RANGES)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 12)))


def _run(rng: random.Random) -> str:
    return rng.choice(WHITESPACE) * rng.randint(1, 7)


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 14)))


def _choice(values: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


PARTS: tuple[Callable[[random.Random], str], ...] = (
    _words, _words, _words, _code, _range, _range, _run, _run, _digits, _choice(WHITESPACE),
    _choice(ODD_SPACES), _choice(EMOJI),
    _choice(COMBINING), _choice(NUMBERS), _choice(NUMBERS), _choice(PUNCTUATION), _choice(PUNCTUATION),
    _choice(WEB),
    _choice(NEAR_SPECIALS),
)  # fmt: skip


def plain_strings(seed: int, num_mixed: int) -> list[str]:
    """Every ingredient by itself and in small neighbourhoods, then `num_mixed` random mixtures."""
    rng = random.Random(seed)
    return list(dict.fromkeys(_plain(rng, num_mixed)))


def _plain(rng: random.Random, num_mixed: int) -> Iterator[str]:
    yield ""
    for group in (SENTENCES, CODE, WEB, EMOJI, COMBINING, NUMBERS, PUNCTUATION, NEAR_SPECIALS, SPECIALS):
        yield from group
    for space in (*WHITESPACE, *ODD_SPACES):
        yield from (
            space,
            f"{space}{space}",
            f"a{space}b",
            f"{space} x",
            f" {space}1",
            f"end{space}",
            f"!{space}\n",
        )
    for low, high in UNICODE_RANGES:
        yield "".join(chr(code) for code in range(low, min(high, low + 48)))
    for control in range(1, 32):
        yield f"a{chr(control)}b {chr(control)}{chr(control)}c"
    for length in range(1, 40):
        yield " " * length + "x"
        yield _digits(rng) + "." + _digits(rng)
    for _ in range(num_mixed):
        glue = rng.choice(("", " ", ""))
        yield glue.join(rng.choice(PARTS)(rng) for _ in range(rng.randint(2, 9)))


def prompts_with_specials(seed: int, num_prompts: int) -> list[str]:
    """Rendered chats, and special tokens in odd places."""
    rng = random.Random(seed)
    prompts = [*SPECIALS, "".join(SPECIALS), " ".join(SPECIALS), *NEAR_SPECIALS]
    while len(prompts) < num_prompts:
        if rng.random() < 0.6:
            turns = [
                f"<|im_start|>{rng.choice(ROLES)}\n{_mixture(rng)}<|im_end|>\n"
                for _ in range(rng.randint(1, 4))
            ]
            prompts.append("".join(turns) + "<|im_start|>assistant\n")
        else:
            prompts.append("".join(_mixture(rng) + rng.choice(SPECIALS) for _ in range(rng.randint(1, 4))))
    return list(dict.fromkeys(prompts))


def _mixture(rng: random.Random) -> str:
    return "".join(rng.choice(PARTS)(rng) for _ in range(rng.randint(0, 5)))
