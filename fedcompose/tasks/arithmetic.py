"""Arithmetic in worked steps. Numbers are the distinct questions under the default config."""

from __future__ import annotations

import math
from random import Random

from pydantic import Field

from fedcompose.tasks.example import Example
from fedcompose.tasks.generators import Generator, GeneratorConfig


class ChainSumConfig(GeneratorConfig):
    terms: int = Field(4, ge=2, le=10)
    max_term: int = Field(9, ge=5, le=9999)


def _chain_sum(source: Random, config: ChainSumConfig) -> Example:
    """`8 + 8 - 1 - 5`, never below zero on the way (about 25,000)."""
    total = source.randint(1, config.max_term)
    question, steps = str(total), []
    for _ in range(config.terms - 1):
        term = source.randint(1, config.max_term)
        sign = source.choice("+-") if term <= total else "+"
        after = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={after}")
        question, total = f"{question} {sign} {term}", after
    return Example(f"What is {question}?", str(total), f"{', '.join(steps)}.")


class GcdConfig(GeneratorConfig):
    max_number: int = Field(144, ge=24, le=9999)
    max_gcd: int = Field(12, ge=2, le=100)


def _gcd(source: Random, config: GcdConfig) -> Example:
    """`gcd of 84 and 36`, by Euclid's steps; every divisor equally often (about 4,700)."""
    divisor = source.randint(1, min(config.max_gcd, config.max_number // 4))
    while True:
        a, b = sorted(source.sample(range(2, config.max_number // divisor + 1), 2), reverse=True)
        if math.gcd(a, b) == 1:
            break
    question = f"What is the gcd of {divisor * a} and {divisor * b}?"
    steps, left, right = [], divisor * a, divisor * b
    while right:
        steps.append(f"{left}%{right}={left % right}")
        left, right = right, left % right
    return Example(question, str(divisor), f"{', '.join(steps)}.")


class ModularConfig(GeneratorConfig):
    max_factor: int = Field(12, ge=4, le=99)
    max_modulus: int = Field(12, ge=5, le=99)


def _modular(source: Random, config: ModularConfig) -> Example:
    """`(7*8 + 5) mod 9`: product, sum, the multiple below, the rest (about 20,000)."""
    a, b = source.randint(2, config.max_factor), source.randint(2, config.max_factor)
    c, modulus = source.randint(1, 20), source.randint(3, config.max_modulus)
    product, total = a * b, a * b + c
    quotient, rest = divmod(total, modulus)
    steps = f"{a}*{b}={product}, {product}+{c}={total}, {quotient}*{modulus}={quotient * modulus}, "
    return Example(f"What is ({a}*{b} + {c}) mod {modulus}?", str(rest), f"{steps}{total}-{quotient * modulus}={rest}.")


class RemainderConfig(GeneratorConfig):
    digits: int = Field(3, ge=2, le=8)
    max_divisor: int = Field(12, ge=5, le=99)


def _remainder(source: Random, config: RemainderConfig) -> Example:
    """`437 mod 7` by long division, one digit at a time (about 9,000)."""
    number = source.randrange(10 ** (config.digits - 1), 10**config.digits)
    divisor = source.randint(3, config.max_divisor)
    steps, rest = [], 0
    for digit in str(number):
        part = 10 * rest + int(digit)
        rest = part % divisor
        steps.append(f"{part}%{divisor}={rest}")
    return Example(f"What is {number} mod {divisor}?", str(rest), f"{', '.join(steps)}.")


class MultiplyConfig(GeneratorConfig):
    digits: int = Field(3, ge=2, le=6)


def _multiply(source: Random, config: MultiplyConfig) -> Example:
    """`347 * 8`, one digit at a time (about 7,200)."""
    number, factor = source.randrange(10 ** (config.digits - 1), 10**config.digits), source.randint(2, 9)
    places = [int(digit) * 10**power for power, digit in enumerate(reversed(str(number)))][::-1]
    steps, total = [], 0
    for place in filter(None, places):
        product = place * factor
        steps.append(f"{place}*{factor}={product}")
        if total:
            steps.append(f"{total}+{product}={total + product}")
        total += product
    return Example(f"What is {number} * {factor}?", str(total), f"{', '.join(steps)}.")


class BaseConvertConfig(GeneratorConfig):
    min_bits: int = Field(6, ge=2, le=20)
    max_bits: int = Field(12, ge=4, le=20)


def _base_convert(source: Random, config: BaseConvertConfig) -> Example:
    """`binary 101101` by doubling from the left and adding the next bit (about 4,000)."""
    low, high = sorted((config.min_bits, config.max_bits))
    number = source.randrange(2 ** (low - 1), 2**high)
    running = [number >> shift for shift in reversed(range(number.bit_length()))]
    return Example(f"What is binary {number:b} in decimal?", str(number), f"{' '.join(map(str, running))}.")


GENERATORS = (
    Generator("chain_sum", "numeric", ChainSumConfig, _chain_sum),
    Generator("gcd", "numeric", GcdConfig, _gcd),
    Generator("modular", "numeric", ModularConfig, _modular),
    Generator("remainder", "numeric", RemainderConfig, _remainder),
    Generator("multiply", "numeric", MultiplyConfig, _multiply),
    Generator("base_convert", "numeric", BaseConvertConfig, _base_convert),
)
