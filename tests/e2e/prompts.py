"""Prompts of given lengths, as token ids, from text that a language model finds ordinary."""

from cluster.text import Tokenizer

TEXT = (
    "The harbour wakes before the town does. Boats that went out at midnight come back with their lamps "
    "still lit, and the first buyers stand on the wet stones with their collars up, guessing at the catch. "
    "Prices are not spoken aloud here; a nod is an offer, a turned shoulder a refusal. By six the auction "
    "is over, the ice has been shovelled into crates, and the lorries are climbing the hill towards the "
    "motorway. What is left is for the cafes. They fry it in butter and serve it on thick white plates to "
    "people who have nowhere to be before nine. A visitor once asked the oldest of the fishermen how he "
    "knew where to set the nets. He thought about it for as long as it takes to fill a pipe. The sea tells "
    "you, he said, but it only tells you once, and it does not care whether you were listening. In 1987 "
    "the council counted 214 boats; last spring there were 31. The school has a mural of the old fleet, "
    "painted by children who had never seen it, and every boat in it is smiling. "
)


def prompt_token_ids(tokenizer: Tokenizer, length: int, index: int) -> list[int]:
    """`length` tokens; different `index`, different prompt from the first token on."""
    ids = tokenizer.encode(TEXT * (2 + length // 200), allow_special=False)
    start = (index * 37) % 150
    return ids[start : start + length]


LENGTHS = (5, 7, 11, 16, 17, 24, 31, 33, 48, 64, 65, 90, 128, 150, 200, 257, 320, 400, 512, 600)
