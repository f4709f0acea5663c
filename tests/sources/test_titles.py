"""Catalog titles turned back into spoken ones."""

import pytest

from owlrec.sources.raw import natural_title, title_year


@pytest.mark.parametrize(
    ("catalogd", "spoken"),
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Fish Called Wanda, A (1988)", "A Fish Called Wanda (1988)"),
        ("American Werewolf in London, An (1981)", "An American Werewolf in London (1981)"),
        ("Promesse, La (1996)", "La Promesse (1996)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Boot, Das (1981)", "Das Boot (1981)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("Tin Drum, The (Blechtrommel, Die) (1979)", "The Tin Drum (Die Blechtrommel) (1979)"),
        ("Seven Samurai (a.k.a. Magnificent Seven, The) (1954)", "Seven Samurai (a.k.a. The Magnificent Seven) (1954)"),
        ("Thing, The", "The Thing"),
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Paris, Texas (1984)", "Paris, Texas (1984)"),
        ("Corrina, Corrina (1994)", "Corrina, Corrina (1994)"),
        ("Man, The Myth (1999)", "Man, The Myth (1999)"),
        (" unknown ", "unknown"),
        ("", ""),
    ],
)
def test_trailing_articles_move_to_the_front(catalogd: str, spoken: str) -> None:
    assert natural_title(catalogd) == spoken


@pytest.mark.parametrize(
    ("title", "year"),
    [
        ("Toy Story (1995)", "1995"),
        ("2001: A Space Odyssey (1968)", "1968"),
        ("Land Before Time III (1995) (V)", "1995"),
        ("Series (2005-2010)", "2005"),
        ("Remade (1950) (1990)", "1990"),
        ("unknown", ""),
    ],
)
def test_year_is_the_last_in_brackets(title: str, year: str) -> None:
    assert title_year(title) == year
