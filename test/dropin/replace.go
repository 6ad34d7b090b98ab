package main

// Replacing net.Listen in a file's text: its lines stay where they are.

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
)

const ourPath = "github.com/lblisten/lblisten"

// An edit puts text in the place of what is between two offsets.
type edit struct {
	from, to int
	text     string
}

// replaceListen has a file call lblisten with the options (such as "lblisten.WithLB()",
// or none) where it calls net.Listen, or Listen of a net.ListenConfig. It returns how many
// places it has changed, and those that it has left alone, with the reason.
func replaceListen(name string, src []byte, options string) (out []byte, n int, left []string, err error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, 0)
	if err != nil {
		return nil, 0, nil, err
	}
	pkg := importName(file, "net")
	if pkg == "" {
		return src, 0, nil, nil
	}
	r := replacer{fset: fset, net: pkg, options: options, configs: configs(file, pkg)}
	ast.Inspect(file, r.look)
	if options != "" && r.asserts && len(r.edits) > 0 {
		return src, 0, []string{name + ": asserts *net.TCPListener, which a balanced listener isn't"}, nil
	}
	if r.n == 0 {
		return src, 0, r.left, nil
	}
	end := fset.Position(file.Name.End()).Offset
	r.edits = append(r.edits,
		edit{end, end, fmt.Sprintf("; import %q", ourPath)},
		edit{len(src), len(src), fmt.Sprintf("\n\nvar _ %s.Listener // used, whatever was replaced\n", pkg)})
	slices.SortStableFunc(r.edits, func(a, b edit) int { return a.from - b.from })
	at := 0
	for _, e := range r.edits {
		out = append(append(out, src[at:e.from]...), e.text...)
		at = e.to
	}
	return append(out, src[at:]...), r.n, r.left, nil
}

// importName returns what a file calls a package, "" if it doesn't import it.
func importName(file *ast.File, path string) string {
	for _, i := range file.Imports {
		if p, _ := strconv.Unquote(i.Path.Value); p != path {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path
	}
	return ""
}

// configs returns the names of a file's variables that are a net.ListenConfig.
func configs(file *ast.File, pkg string) map[string]bool {
	names := map[string]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for _, name := range n.Names {
				names[name.Name] = names[name.Name] || isOf(n.Type, pkg, "ListenConfig")
			}
		case *ast.AssignStmt:
			lit, ok := n.Rhs[0].(*ast.CompositeLit)
			if id, named := n.Lhs[0].(*ast.Ident); ok && named && isOf(lit.Type, pkg, "ListenConfig") {
				names[id.Name] = true
			}
		}
		return true
	})
	return names
}

// isOf tells whether an expression is pkg.name.
func isOf(e ast.Expr, pkg, name string) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != name {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg
}

// A replacer collects what is to be changed in a file.
type replacer struct {
	fset    *token.FileSet
	net     string // what the file calls package net
	options string
	configs map[string]bool

	edits   []edit
	n       int
	left    []string
	asserts bool // *net.TCPListener
}

func (r *replacer) look(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		return r.call(n)
	case *ast.SelectorExpr:
		if isOf(n, r.net, "Listen") { // a value
			r.put(n.Pos(), n.End(), fmt.Sprintf("func(network, address string) (%s.Listener, error) { return lblisten.Listen(network, address%s) }",
				r.net, r.more(r.options)))
			r.n++
		}
	case *ast.TypeAssertExpr:
		if star, ok := n.Type.(*ast.StarExpr); ok && isOf(star.X, r.net, "TCPListener") {
			r.asserts = true
		}
	}
	return true
}

func (r *replacer) call(c *ast.CallExpr) bool {
	fun, ok := c.Fun.(*ast.SelectorExpr)
	if !ok {
		return true
	}
	config, _ := fun.X.(*ast.Ident)
	switch {
	case isOf(fun, r.net, "Listen") && len(c.Args) == 2:
		r.put(fun.Pos(), fun.End(), "lblisten.Listen")
		r.put(c.Rparen, c.Rparen, r.more(r.options))
	case fun.Sel.Name == "Listen" && len(c.Args) == 3 && config != nil && r.configs[config.Name]:
		r.put(fun.Pos(), fun.End(), "lblisten.ListenContext")
		r.put(c.Rparen, c.Rparen, r.more("lblisten.WithListenConfig("+config.Name+")")+r.more(r.options))
	case isOf(fun, r.net, "ListenTCP"), isOf(fun, r.net, "ListenUnix"):
		p := r.fset.Position(c.Pos())
		r.left = append(r.left, fmt.Sprintf("%s:%d: %s returns a type of package net", p.Filename, p.Line, fun.Sel.Name))
		return true
	default:
		return true
	}
	r.n++
	for _, a := range c.Args {
		ast.Inspect(a, r.look)
	}
	return false
}

func (r *replacer) more(option string) string {
	if option == "" {
		return ""
	}
	return ", " + option
}

func (r *replacer) put(from, to token.Pos, text string) {
	r.edits = append(r.edits, edit{r.fset.Position(from).Offset, r.fset.Position(to).Offset, text})
}
