package main

// The plots, as SVG. They have a background of their own, and on dark pages other
// colours.

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Colours that people with any colour vision can tell apart (Okabe and Ito), on
// white.
var (
	ink   = color.RGBA{0x22, 0x22, 0x22, 0xff}
	faint = color.RGBA{0xdd, 0xdd, 0xdd, 0xff}
	grey  = color.RGBA{0x99, 0x99, 0x99, 0xff}
	ours  = color.RGBA{0x00, 0x72, 0xb2, 0xff}
	lines = []color.RGBA{{0x55, 0x55, 0x55, 0xff}, {0xd5, 0x5e, 0x00, 0xff}, {0x00, 0x72, 0xb2, 0xff}, {0x00, 0x9e, 0x73, 0xff}, {0xcc, 0x79, 0xa7, 0xff}}
)

const width = 7.5 * vg.Inch

// newPlot has short labels only: long ones narrow the plot (gonum takes room for
// them as for ticks). It has none at the vertical axis, whose ticks have units.
func newPlot(title, x string) *plot.Plot {
	p := plot.New()
	p.BackgroundColor = color.White
	p.Title.Text = title
	p.Title.Padding = vg.Points(10)
	p.X.Label.Text = x
	for _, s := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		s.Font = sans(11)
		s.Color = ink
	}
	p.Title.TextStyle.Font = sans(14)
	p.X.LineStyle.Color, p.Y.LineStyle.Color = grey, grey
	p.X.Tick.LineStyle.Color, p.Y.Tick.LineStyle.Color = grey, grey
	p.X.Label.Padding = vg.Points(6)
	p.Legend.ThumbnailWidth = vg.Points(22)
	p.Legend.Padding = vg.Points(3)
	return p
}

func sans(size vg.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

// grid draws lines at the labelled ticks.
func grid(p *plot.Plot) {
	g := plotter.NewGrid()
	g.Vertical.Color, g.Horizontal.Color = faint, faint
	p.Add(g)
}

// canvas notes how wide each text is meant to be. The width goes into the SVG, so
// that a reader without the font by which it was laid out doesn't spill it.
type canvas struct {
	*vgsvg.Canvas
	widths []vg.Length
}

func (c *canvas) FillString(f font.Face, at vg.Point, s string) {
	c.Canvas.FillString(f, at, s)
	c.widths = append(c.widths, f.Width(s))
}

// save writes plots side by side.
func save(file string, height vg.Length, plots ...*plot.Plot) error {
	c := &canvas{Canvas: vgsvg.New(width, height)}
	dc := draw.NewCanvas(c, width, height)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	area := draw.Crop(dc, vg.Points(8), -vg.Points(14), vg.Points(8), -vg.Points(8))
	tiles := draw.Tiles{Rows: 1, Cols: len(plots), PadX: vg.Points(16)}
	for i, p := range plots {
		p.Draw(tiles.At(area, i, 0))
	}
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return err
	}
	svg := strings.ReplaceAll(b.String(), "font-family:Liberation Sans", "font-family:'Liberation Sans',Arial,Helvetica,sans-serif")
	texts := strings.Split(svg, "<text ")
	if len(texts) != len(c.widths)+1 {
		return fmt.Errorf("%d texts in the SVG where %d were drawn", len(texts)-1, len(c.widths))
	}
	for i, w := range c.widths {
		texts[i+1] = fmt.Sprintf(`textLength="%.2f" lengthAdjust="spacingAndGlyphs" `, w.Points()) + texts[i+1]
	}
	svg = strings.Join(texts, "<text ")
	head, rest, ok := strings.Cut(svg, "<g ")
	if !ok {
		return errors.New("an SVG without a group")
	}
	return os.WriteFile(file, []byte(head+night+"<g "+rest), 0o644)
}

// night has a reader that prefers dark pages see other colours, where GitHub shows the file
// as a picture too.
const night = `<style>@media (prefers-color-scheme: dark) {
[style*="fill:#FFFFFF"] { fill: #0d1117 !important }
[style*="fill:#222222"] { fill: #e6edf3 !important }
[style*="stroke:#DDDDDD"] { stroke: #30363d !important }
[style*="stroke:#555555"] { stroke: #b1bac4 !important }
[style*="fill:#555555"] { fill: #b1bac4 !important }
[style*="stroke:#0072B2"] { stroke: #58a6ff !important }
[style*="fill:#0072B2"] { fill: #58a6ff !important }
}</style>
`

// ticks are marks at given values.
func ticks(format string, values ...float64) plot.ConstantTicks {
	var t plot.ConstantTicks
	for _, v := range values {
		t = append(t, plot.Tick{Value: v, Label: fmt.Sprintf(format, v)})
	}
	return t
}

func plotAccept(t *Table, file string) error {
	return plotBars(t, 1, "CPU time of an Accept, net.Listen = 1", "%.2f", file)
}

func plotLive(t *Table, file string) error {
	return plotBars(t, 1, "CPU time of a connection, net.Listen = 1", "%.2f", file)
}

func plotRestart(t *Table, file string) error {
	return plotBars(t, 1, "Failed requests while one process is restarted 20 times", "%.0f", file)
}

// plotBars draws a column as bars, the least at the bottom.
func plotBars(t *Table, column int, title, format, file string) error {
	p := newPlot(title, "")
	var names []string
	var values []float64
	for _, r := range t.Rows {
		if r.Skipped == "" {
			names, values = append(names, r.Name), append(values, r.Values[column])
		}
	}
	for i := range names { // few: the simplest sort, which moves both
		for j := i + 1; j < len(names); j++ {
			if values[j] < values[i] {
				names[i], names[j], values[i], values[j] = names[j], names[i], values[j], values[i]
			}
		}
	}
	most := 0.0
	labels := plotter.XYLabels{}
	for i, v := range values {
		bar, err := plotter.NewBarChart(plotter.Values{v}, vg.Points(17))
		if err != nil {
			return err
		}
		bar.Horizontal = true
		bar.XMin = float64(i)
		bar.LineStyle.Width = 0
		bar.Color = grey
		if strings.HasPrefix(names[i], "lb") { // lblisten, lbhttp
			bar.Color = ours
		}
		p.Add(bar)
		most = max(most, v)
		labels.XYs = append(labels.XYs, plotter.XY{X: v, Y: float64(i)})
		labels.Labels = append(labels.Labels, fmt.Sprintf(format, v))
	}
	numbers, err := plotter.NewLabels(labels)
	if err != nil {
		return err
	}
	for i := range numbers.TextStyle {
		numbers.TextStyle[i].Font = sans(11)
		numbers.TextStyle[i].Color = ink
		numbers.TextStyle[i].YAlign = draw.YCenter
	}
	numbers.Offset = vg.Point{X: vg.Points(5)}
	p.Add(numbers)
	p.NominalY(names...)
	p.Y.LineStyle.Width, p.Y.Tick.Length = 0, 0
	p.HideX()
	p.X.Min, p.X.Max = 0, most*1.08
	p.Y.Min, p.Y.Max = -0.5, float64(len(names))-0.5
	return save(file, vg.Points(float64(26*len(names)+50)), p)
}

// plotStall draws which share of connections took longer than so long.
func plotStall(t *Table, file string) error {
	p := newPlot("Share of connections slower than x, while one of four listeners stalls", "x (ms)")
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker = ticks("%g", 0.1, 1, 10, 100)
	p.Y.Tick.Marker = ticks("%g %%", 0.01, 0.1, 1, 10, 100)
	grid(p)
	const least = 0.01
	for i, s := range t.Series {
		var xy plotter.XYs
		for j, x := range s.X {
			y := s.Y[j]
			xy = append(xy, plotter.XY{X: x, Y: max(y, least)})
			if y < least {
				break
			}
		}
		if err := addLine(p, s.Name, xy, i, false); err != nil {
			return err
		}
	}
	p.X.Min, p.X.Max = 0.05, 200
	p.Y.Min, p.Y.Max = least*0.9, 110
	p.Legend.Left, p.Legend.Top = true, false
	p.Legend.XOffs, p.Legend.YOffs = vg.Points(10), vg.Points(8)
	return save(file, 4.2*vg.Inch, p)
}

func addLine(p *plot.Plot, name string, xy plotter.XYs, i int, points bool) error {
	l, dots, err := plotter.NewLinePoints(xy)
	if err != nil {
		return err
	}
	l.Width = vg.Points(2)
	l.Color = lines[i%len(lines)]
	if i%2 == 1 { // so that it hides none that is exactly below
		l.Dashes = []vg.Length{vg.Points(7), vg.Points(4)}
	}
	p.Add(l)
	if !points {
		p.Legend.Add(name, l)
		return nil
	}
	dots.Shape = draw.CircleGlyph{}
	dots.Radius = vg.Points(2.5)
	dots.Color = l.Color
	p.Add(dots)
	p.Legend.Add(name, l, dots)
	return nil
}

// plotMembers has the kernel's group on the left and the dispatcher's on the right.
func plotMembers(t *Table, file string) error {
	var plots []*plot.Plot
	for _, balancer := range []string{"kernel", "dispatcher"} {
		var own []Series
		for _, s := range t.Series {
			if name, ok := strings.CutPrefix(s.Name, balancer+": "); ok {
				own = append(own, Series{Name: name, X: s.X, Y: s.Y})
			}
		}
		p, err := bySize("Balanced by the "+balancer, "members", own, t.Series, 5)
		if err != nil {
			return err
		}
		plots = append(plots, p)
	}
	return save(file, 4*vg.Inch, plots...)
}

// plotProcesses has the time of Listen by the number of processes.
func plotProcesses(t *Table, file string) error {
	p, err := bySize("Listen in so many processes of a handoff at once", "processes", t.Series, t.Series, 2)
	if err != nil {
		return err
	}
	return save(file, 3.6*vg.Inch, p)
}

func plotGoroutines(t *Table, file string) error {
	p, err := bySize("CPU time of an Accept by the number of accepting goroutines", "goroutines", t.Series, t.Series, 3)
	if err != nil {
		return err
	}
	// These differ by little: from 0, and linear.
	p.Y.Scale = plot.LinearScale{}
	most := 0.0
	for _, s := range t.Series {
		most = max(most, slices.Max(s.Y))
	}
	var us plot.ConstantTicks
	for y := 0.0; y <= most+4e3; y += 4e3 {
		us = append(us, plot.Tick{Value: y, Label: fmt.Sprintf("%g us", y/1e3)})
	}
	p.Y.Tick.Marker, p.Y.Min, p.Y.Max = us, 0, most*1.5
	return save(file, 3.6*vg.Inch, p)
}

// bySize draws lines of nanoseconds over sizes, both logarithmic. The scale is
// that of all, with room for a legend of so many, so that plots side by side have
// the same.
func bySize(title, x string, series, all []Series, legend int) (*plot.Plot, error) {
	p := newPlot(title, x)
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	low, high := math.Inf(1), 0.0
	for _, s := range all {
		for _, y := range s.Y {
			low, high = min(low, y), max(high, y)
		}
	}
	low = math.Pow(10, math.Floor(math.Log10(low)))
	high = math.Pow(10, math.Ceil(math.Log10(high)))
	var yTicks plot.ConstantTicks
	for y, n := low, 0; y <= high*1.01; y, n = y*10, n+1 {
		label := fmt.Sprintf("%g ns", y)
		switch {
		case y > 0.99e6:
			label = fmt.Sprintf("%g ms", math.Round(y/1e6))
		case y > 0.99e3:
			label = fmt.Sprintf("%g us", math.Round(y/1e3))
		}
		yTicks = append(yTicks, plot.Tick{Value: y, Label: label})
	}
	p.Y.Tick.Marker = yTicks
	p.X.Tick.Marker = ticks("%g", series[0].X...)
	grid(p)
	for i, s := range series {
		var xy plotter.XYs
		for j := range s.X {
			xy = append(xy, plotter.XY{X: s.X[j], Y: s.Y[j]})
		}
		if err := addLine(p, s.Name, xy, i, true); err != nil {
			return nil, err
		}
	}
	p.X.Min, p.X.Max = series[0].X[0]*0.85, series[0].X[len(series[0].X)-1]*1.15
	// The legend stands above the lines, in room of its own.
	p.Y.Min, p.Y.Max = low, high*math.Pow(high/low, 0.06+0.06*float64(legend))
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.XOffs = vg.Points(8)
	return p, nil
}
