"""A tiny byte-level tokenizer, and chat templates written in the manner of well-known families.

The tokenizer knows every byte and a few merges, some of which reach across the places where a
prompt ends and an answer begins.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# In the alphabet of byte-level tokenizers Ġ is the space and Ċ the newline.
MERGES = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), (":", "Ġ"), ("Ġ", "a"), ("a", "b"), ("ab", "c")]


@dataclass(frozen=True)
class Family:
    """What the tests need to know of a family: its markers, and a dialogue as it writes it."""

    template: str | None
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    adds_bos: bool = False  # before plain text
    not_special: tuple[str, ...] = ()  # added tokens without the flag
    prompt: str = ""  # user: Name a river.
    answer: str = ""  # assistant: The Rhine.
    follows: str = ""  # what the template writes after the turn end


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
FAMILIES = {
    "chatml": Family(
        template=CHATML,
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        prompt="<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
        answer="The Rhine.<|im_end|>",
        follows="\n",
    ),
    "chatml, markers not special": Family(
        template=CHATML,
        special=("<|endoftext|>",),
        not_special=("<|im_start|>", "<|im_end|>", "<unrelated>", "\n\n\n"),
        eos="<|endoftext|>",
        prompt="<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
        answer="The Rhine.<|im_end|>",
        follows="\n",
    ),
    "mistral": Family(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        special=("<s>", "</s>", "<unk>"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        prompt="<s>[INST] Name a river. [/INST]",
        answer=" The Rhine.</s>",
    ),
    "llama 3": Family(
        template="<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>{{ '\n\n' + m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
        "{% endif %}",
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>"),
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        adds_bos=True,
        prompt="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a river."
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="The Rhine.<|eot_id|>",
    ),
    "qwen 3": Family(  # an empty thought before the last answer, none before earlier ones
        template="{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}<think>{{ '\n\n' }}</think>{{ '\n\n' }}"
        "{% endif %}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        not_special=("<think>", "</think>"),
        eos="<|im_end|>",
        prompt="<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
        answer="<think>\n\n</think>\n\nThe Rhine.<|im_end|>",
        follows="\n",
    ),
    "phi 3": Family(  # EOS closes every text that does not ask for an answer
        template="{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}<|end|>{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        prompt="<|user|>\nName a river.<|end|>\n<|assistant|>\n",
        answer="The Rhine.<|end|>",
        follows="\n<|endoftext|>",
    ),
    "phi 4": Family(
        template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        prompt="<|user|>Name a river.<|end|><|assistant|>",
        answer="The Rhine.<|end|>",
        follows="<|endoftext|>",
    ),
    "command r": Family(  # two control tokens in a row, the second of which ends the turn
        template="{% for m in messages %}<turn><{{ m.role }}>{{ '' }}"
        "{% if m.role == 'assistant' %}<response>{{ m.content }}</response>"
        "{% else %}{{ m.content }}{% endif %}</turn>{% endfor %}"
        "{% if add_generation_prompt %}<turn><assistant>{% endif %}",
        special=("<turn>", "</turn>", "<user>", "<assistant>", "<response>", "</response>"),
        eos="</turn>",
        prompt="<turn><user>Name a river.</turn><turn><assistant>",
        answer="<response>The Rhine.</response></turn>",
    ),
    "gemma": Family(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim }}"
        "<end_of_turn>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        prompt="<bos><start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n",
        answer="The Rhine.<end_of_turn>",
        follows="\n",
    ),
    "no turn end": Family(
        template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        special=("</s>",),
        eos="</s>",
        prompt="user: Name a river.\nassistant",
        answer=": The Rhine.\n</s>",
    ),
}
DEEPSEEK_R1 = Family(  # asks for a thought, and leaves it out once the answer is there
    template="{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>{{ '\n' }}{% endif %}",
    special=("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
    not_special=("<think>", "</think>"),
    eos="<|end_of_sentence|>",
)
BASE = Family(template=None, special=("<s>", "</s>"), bos="<s>", eos="</s>", adds_bos=True)
GPT_2 = Family(template=None, special=("<|endoftext|>",), eos="<|endoftext|>")


def build(family: Family, *, pad: str | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + ["".join(pair) for pair in MERGES]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, MERGES))
    # Without the regex, merges reach across words, as those of SentencePiece do.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in family.special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in family.not_special])
    if family.adds_bos:
        bos = (str(family.bos), backend.token_to_id(str(family.bos)))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=pad,
        chat_template=family.template,
    )
