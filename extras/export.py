"""Write the weights of a checkpoint as a state dict that open_clip loads, and next to it open_clip's model config.

    python -m extras.export CKPT OUT.pt                 writes OUT.pt and OUT.json, and prints how to load them

open_clip has no tokenizer for merges that were learned; use the one that eval.load gives.
"""
from pathlib import Path

from eval import load
from plumbing.errors import command, need, warn
from plumbing.files import save_tensors, write_json
from plumbing.options import Parser
from plumbing.weights import to_openclip

# How those of our names begin that have a counterpart in open_clip. Cross-attention has none.
OPENCLIP_HAS = 'visual.', 'text.', 'logit_scale'


def openclip_config(c):
    """Our Config -> open_clip's model config, which has no place for cross-attention."""
    vision = {'image_size': c.image_size, 'patch_size': c.patch_size, 'width': c.vision_width,
              'layers': c.vision_layers, 'head_width': c.vision_width // c.vision_heads}
    text = {'context_length': c.context_length, 'vocab_size': c.vocab_size, 'width': c.text_width,
            'layers': c.text_layers, 'heads': c.text_heads}
    return {'embed_dim': c.embed_dim, 'vision_cfg': vision, 'text_cfg': text, 'quick_gelu': c.quick_gelu}


def export(checkpoint, out):
    """Write the towers and the scale of the teacher (of the student if there is no teacher) under open_clip's names,
    and next to them open_clip's model config. Cross-attention is left out."""
    path = Path(out)
    layout = path.with_suffix('.json')
    need(path != layout, f'{path} is where the config goes; call the weights {path.stem}.pt')
    need(not path.exists() and not layout.exists(), f'{path} or {layout} exists; name another file')
    model, _, _ = load(checkpoint)
    print(f'export of {model.origin}')
    c = model.config
    if c.vision_width != 64 * c.vision_heads or c.text_width != 64 * c.text_heads:
        warn(f'its heads are not 64 wide, so eval.py and --init would read {path} wrongly; give them {checkpoint}')
    write_json(layout, openclip_config(c))
    state = model.state_dict()
    towers = {name: state[name] for name in state if name.startswith(OPENCLIP_HAS)}
    save_tensors(path, to_openclip(towers))
    print(f"open_clip.add_model_config('{layout}')\n"
          f"model = open_clip.create_model('{path.stem}', pretrained='{path}')")


def main():
    parser = Parser(prog='python -m extras.export', usage='%(prog)s CKPT OUT.pt', epilog=__doc__)
    parser.add_argument('checkpoint', metavar='CKPT')
    parser.add_argument('out', metavar='OUT.pt', help='OUT.json is written next to it')
    export(**vars(parser.parse_args()))


if __name__ == '__main__':
    command(main)
