"""Codes that ranks have a share of each, while a block is trained."""

from code_shares import a_block, a_rank
from rank_commands import free_port
from torch.multiprocessing import spawn

from compress.calib.ranks import ALONE
from compress.sharing import share_codes


def test_two_ranks_have_half_of_the_codes_each_and_every_bit_of_the_results():
    spawn(a_rank, (free_port(),), nprocs=2)


def test_one_process_keeps_what_it_has():
    block = a_block()
    before = dict(block.named_parameters())
    share_codes(block, ALONE)
    assert all(parameter is before[name] for name, parameter in block.named_parameters())
