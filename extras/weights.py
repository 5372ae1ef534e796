"""Convert weights from and to the formats of other programs.

    python -m extras.weights export CKPT OUT.pt                   a state dict that open_clip loads, and OUT.json
    python -m extras.weights import clip.pt OUT.pt --quick-gelu   OpenAI's CLIP, or another, as our checkpoint
    python -m extras.weights import clip.safetensors OUT.pt --config ViT-H-14.json

Weights do not say how wide an attention head is, nor what the activation is. open_clip's model config, a JSON file,
says both. Without it heads are taken to be 64 wide. Every other command reads what `import` writes.
"""
from dataclasses import asdict, replace
from pathlib import Path

import torch

from cosmos import COSMOS
from eval import load
from plumbing.errors import Refused, command, need
from plumbing.files import read_json, reading, save_tensors, write_json
from plumbing.options import Parser
from plumbing.tokenizer import Tokenizer
from plumbing.weights import (clean_names, from_openclip, infer_config, load_weights,
                              read_checkpoint, to_openclip)

# --- 1. Ours for open_clip -------------------------------------------------------------------------------------------

CLIP_VOCABULARY = 49408
# How those of our names begin that have a counterpart in open_clip. Cross-attention has none.
OPENCLIP_HAS = 'visual.', 'text.', 'logit_scale'


def openclip_config(c):
    """Our Config -> open_clip's model config, which has no place for cross-attention."""
    vision = {'image_size': c.image_size, 'patch_size': c.patch_size, 'width': c.vision_width,
              'layers': c.vision_layers, 'head_width': c.vision_width // c.vision_heads}
    text = {'context_length': c.context_length, 'vocab_size': c.vocab_size, 'width': c.text_width,
            'layers': c.text_layers, 'heads': c.text_heads}
    return {'embed_dim': c.embed_dim, 'vision_cfg': vision, 'text_cfg': text,
            'quick_gelu': c.quick_gelu}


def export(checkpoint, out):
    """Write the towers and the scale of the teacher (of the student if there is no teacher) under open_clip's names,
    and next to them open_clip's model config. Cross-attention is left out."""
    path = Path(out)
    layout = path.with_suffix('.json')
    need(path != layout, f'{path} would also be the name of the config; name it {path.stem}.pt')
    need(not path.exists() and not layout.exists(), f'{path} or {layout} exists; name another file')
    model, _, _ = load(checkpoint)
    write_json(layout, openclip_config(model.config))
    state = model.state_dict()
    towers = {name: state[name] for name in state if name.startswith(OPENCLIP_HAS)}
    save_tensors(path, to_openclip(towers))
    print(f"open_clip.add_model_config('{layout}')\n"
          f"model = open_clip.create_model('{path.stem}', pretrained='{path}')")
    if model.config.vocab_size != CLIP_VOCABULARY:
        print('# The merges were learned, so open_clip has no tokenizer for them; '
              'use the one that eval.load gives.')


# --- 2. Others' as ours ----------------------------------------------------------------------------------------------

IMPORT = """OTHER.pt is a state dict of a ViT under open_clip's names, or a safetensors file. A file that may
run code is refused. If you trust it, write its tensors into another file, and import that one:

OpenAI's files (TorchScript), which also need --quick-gelu:
    model = open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai')
    torch.save(model.state_dict(), 'clip.pt')
others:
    torch.save(torch.load('other.pt', weights_only=False)['state_dict'], 'clip.pt')"""
# State dicts that were saved from OpenAI's files hold these sizes, too.
SIZES = 'input_resolution', 'context_length', 'vocab_size'


def read_weights(path):
    """A file of tensors -> {name: tensor}."""
    if Path(path).suffix == '.safetensors':
        from safetensors import SafetensorError     # a package of its own, see docs/questions.md
        from safetensors.torch import load_file
        try:
            with reading(path):
                return load_file(path)
        except SafetensorError as error:
            raise Refused(f'{path} is torn, or no safetensors file ({error}); '
                          'fetch it again') from None
    saved = read_checkpoint(path)
    return saved.get('state_dict', saved)


def import_weights(other, out, config=None, quick_gelu=False):
    """Weights of a ViT under open_clip's names -> our checkpoint. config: the path of open_clip's model config."""
    need(not Path(out).exists(), f'{out} exists; name another file')
    state = clean_names(read_weights(other))
    for name in SIZES:
        state.pop(name, None)
    need('visual.class_embedding' in state and 'text_projection' in state,
         f"the tensors of {other} are not named like those of open_clip's ViTs ({', '.join(list(state)[:3])}); "
         'load these weights with open_clip, and save its state dict')
    sizes = infer_config(state, quick_gelu)
    if config:
        layout = read_json(config)
        layout = layout.get('model_cfg', layout)            # as in the Hugging Face hub's files
        head_width = layout['vision_cfg'].get('head_width', 64)
        sizes = replace(sizes, vision_heads=sizes.vision_width // head_width,
                        text_heads=layout['text_cfg']['heads'],
                        quick_gelu=quick_gelu or layout.get('quick_gelu', False))
    tokenizer = Tokenizer.clip(context_length=sizes.context_length)
    need(tokenizer.vocab_size == sizes.vocab_size,
         f"{other} has a vocabulary of {sizes.vocab_size:,} ids, but CLIP's has {tokenizer.vocab_size:,}; "
         'if its merges were learned, take the checkpoint that train.py wrote')
    # In all known models that are wider than 1024, heads are wider than 64.
    width = sizes.vision_width
    need(config or (width <= 1024 and width % 64 == 0),
         f"the heads of {other} are probably not 64 wide; give open_clip's config with --config")
    model = COSMOS(sizes)
    load_weights(model, from_openclip(state), other)
    save_tensors(out, {'config': asdict(sizes), 'merges': tokenizer.merges, 'step': 0,
                       'student': model.state_dict()})
    print(f'checkpoint {out}: {sizes}')
    if not sizes.quick_gelu and not config:
        print("note       GELU is assumed, but OpenAI's weights and some others need --quick-gelu")


# --- 3. Commands -----------------------------------------------------------------------------------------------------

def main():
    prog = 'python -m extras.weights'
    parser = Parser(prog=prog, usage='%(prog)s export|import ...', epilog=__doc__)
    commands = parser.add_subparsers(required=True, prog=prog)
    one = commands.add_parser('export', help='our weights, for open_clip', usage='%(prog)s CKPT OUT.pt')
    one.set_defaults(function=export)
    one.add_argument('checkpoint', metavar='CKPT')
    one.add_argument('out', metavar='OUT.pt', help='OUT.json is written next to it')
    one = commands.add_parser('import', help="other people's weights, as our checkpoint",
                              usage='%(prog)s OTHER.pt OUT.pt [options]', description=IMPORT)
    one.set_defaults(function=import_weights)
    add = one.add_argument
    add('other', metavar='OTHER.pt', help='a state dict, or a safetensors file')
    add('out', metavar='OUT.pt', help='our checkpoint')
    add('--config', help="open_clip's model config, for heads that are not 64 wide")
    add('--quick-gelu', action='store_true', help="the activation of OpenAI's CLIP")
    options = vars(parser.parse_args())
    function = options.pop('function')
    function(**options)


if __name__ == '__main__':
    command(main)
