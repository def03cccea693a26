import pytest

from compress.eval.wikitext import detokenized, is_wikitext, pages

TEXT = ' \n = One = \n \n He said " so " ( twice ) , @-@ 1 @,@ 000 . \n = = Part = = \n \n = Two = \n \n End . \n'


def test_pages_begin_at_titles_and_not_at_sections():
    assert pages(TEXT) == [
        ' = One = \n \n He said " so " ( twice ) , @-@ 1 @,@ 000 . \n = = Part = = \n ',
        " = Two = \n \n End . \n",
    ]
    assert pages("No title. \n = One = \n") == ["No title. \n = One = \n"]
    assert not is_wikitext(" = = Part = = \n") and not is_wikitext("")


def test_a_page_reads_as_written_and_other_text_is_left_alone():
    assert detokenized(pages(TEXT)[0]) == ' = One =\n\nHe said "so" (twice) ,-1,000.\n== Part ==\n'
    assert detokenized("so , it stays") == "so , it stays"


def test_it_is_lm_evals_detokenizer():
    harness = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is missing")
    odd = " = A ( b ) = \n 's ' it ' { x } [ y ] = = = = 5 ° N N ; : ! ? dogs ' cats 's \n \n"
    for page in [*pages(TEXT), odd]:
        assert detokenized(page) == harness.wikitext_detokenizer({"page": page})
