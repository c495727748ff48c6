package comfyuitest

import (
	"math"
	"testing"
)

func TestRepr(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		value any
		want  string
	}{
		{nil, "None"},
		{true, "True"},
		{int64(-3), "-3"},
		{wholeNumber("9223372036854775808"), "9223372036854775808"},
		{1.0, "1.0"},
		{1e16, "1e+16"},
		{1e-5, "1e-05"},
		{0.1, "0.1"},
		{math.NaN(), "nan"},
		{math.Inf(-1), "-inf"},
		{"it's", `"it's"`},
		{`say "it's"`, `'say "it\'s"'`},
		{"a\n\t\\", `'a\n\t\\'`},
		{"\x00\x7f\u00a0é中\U0001f600\U000e0001", `'\x00\x7f\xa0é中😀\U000e0001'`},
		{[]any{"a", int64(1), []any{}}, "['a', 1, []]"},
		{object{{"k", nil}, {"l", object{}}}, "{'k': None, 'l': {}}"},
	} {
		if got := pyRepr(tc.value); got != tc.want {
			t.Errorf("repr(%v) = %s, want %s", tc.value, got, tc.want)
		}
	}
	if got := pyStr("it's"); got != "it's" {
		t.Errorf("str: %s", got)
	}
}

func TestConversions(t *testing.T) {
	t.Parallel()
	long := make([]byte, maxIntDigits+1)
	for i := range long {
		long[i] = '1'
	}
	for _, tc := range []struct {
		name   string
		f      func(any) (any, *exception)
		value  any
		want   string // repr
		raises string
	}{
		{"int", toInt, "  -1_000 ", "-1000", ""},
		{"int", toInt, "007", "7", ""},
		{"int", toInt, "99999999999999999999", "99999999999999999999", ""},
		{"int", toInt, -2.9, "-2", ""},
		{"int", toInt, 1e20, "100000000000000000000", ""},
		{"int", toInt, true, "1", ""},
		{"int", toInt, "1__0", "", "ValueError"},
		{"int", toInt, "1.5", "", "ValueError"},
		{"int", toInt, "", "", "ValueError"},
		{"int", toInt, string(long), "", "ValueError"},
		{"int", toInt, math.Inf(1), "", "OverflowError"},
		{"int", toInt, math.NaN(), "", "ValueError"},
		{"int", toInt, nil, "", "TypeError"},
		{"int", toInt, object{}, "", "TypeError"},
		{"float", toFloat, int64(3), "3.0", ""},
		{"float", toFloat, " 1_0.5e1 ", "105.0", ""},
		{"float", toFloat, ".5", "0.5", ""},
		{"float", toFloat, "5.", "5.0", ""},
		{"float", toFloat, "-Infinity", "-inf", ""},
		{"float", toFloat, "nan", "nan", ""},
		{"float", toFloat, "+inf", "inf", ""},
		{"float", toFloat, "--inf", "", "ValueError"},
		{"float", toFloat, "1e999", "inf", ""},
		{"float", toFloat, wholeNumber("1" + string(long[:400])), "", "OverflowError"},
		{"float", toFloat, "0x10", "", "ValueError"},
		{"float", toFloat, "1e", "", "ValueError"},
		{"float", toFloat, false, "0.0", ""},
		{"float", toFloat, []any{}, "", "TypeError"},
	} {
		got, raised := tc.f(tc.value)
		switch {
		case raised != nil:
			if raised.typ != tc.raises {
				t.Errorf("%s(%.30v) raised %v, want %q", tc.name, tc.value, raised, tc.raises)
			}
		case tc.raises != "" || pyRepr(got) != tc.want:
			t.Errorf("%s(%.30v) = %s, want %s %s", tc.name, tc.value, pyRepr(got), tc.want, tc.raises)
		}
	}
	for value, want := range map[any]bool{nil: false, "": false, "0": true, int64(0): false, 0.5: true, false: false} {
		if toBool(value) != want {
			t.Errorf("bool(%v) = %v", value, !want)
		}
	}
}

func TestLess(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		a, b any
		want bool
	}{
		{int64(1), 1.5, true},
		{1.5, int64(1), false},
		{wholeNumber("9223372036854775808"), int64(math.MaxInt64), false},
		{int64(math.MaxInt64), wholeNumber("9223372036854775808"), true},
		{int64(math.MaxInt64), 9.223372036854775807e18, true}, // exact, where float64 would see them equal
		{math.NaN(), int64(1), false},
		{int64(1), math.NaN(), false},
		{false, true, true},
		{1e300, math.Inf(1), true},
	} {
		if got, raised := less(tc.a, tc.b); got != tc.want || raised != nil {
			t.Errorf("%v < %v is %v, %v", tc.a, tc.b, got, raised)
		}
	}
	if _, raised := less("a", int64(1)); raised == nil || raised.message != "'<' not supported between instances of 'str' and 'int'" {
		t.Errorf("'a' < 1: %v", raised)
	}
}
